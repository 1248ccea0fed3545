"""oneDNN's matrix product for inference on a CPU: the one place that touches torch's operator for it.

torch multiplies float32 matrices with MKL, which takes narrow vector kernels on processors of other makers: on an AMD
EPYC of family 26 it reaches 95 GFLOP/s a core where oneDNN reaches 210, at the same accuracy. The operator is the one
`torch.compile` emits. It has no gradient and knows no autocast, so it serves inference only; callers keep a plain path.
"""

from __future__ import annotations

import torch
from torch import Tensor

_AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_DTYPES = (torch.float32, torch.bfloat16)


def onednn_serves(x: Tensor, weight: Tensor) -> bool:
    """Whether `onednn_linear` may compute `x @ weight.T` here and now."""
    return (
        _AVAILABLE
        and x.device.type == "cpu"
        and weight.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in _DTYPES
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> Tensor:
    """x [..., in] @ weight [out, in].T + bias [out] -> [..., out], with a tanh GELU in the same pass if asked."""
    if torch.compiler.is_compiling():
        return _opaque_linear(x, weight, bias, gelu)
    return _linear(x, weight, bias, gelu)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    kind, algorithm = ("gelu", "tanh") if gelu else ("none", "")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, kind, [], algorithm)


# Inductor lowers the operator only with weights that it packed itself, so a compiled graph calls it as a black box.
_opaque_linear = torch.library.custom_op("kinetoscope::onednn_linear", _linear, mutates_args=())


@_opaque_linear.register_fake  # pyright: ignore[reportUnknownMemberType]
def _(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
