"""oneDNN's kernels for inference on a CPU: the one place that touches torch's operators for them.

torch multiplies float32 matrices with MKL, also inside small 3D convolutions, and MKL takes narrow vector kernels on
processors of other makers: on an AMD EPYC of family 26 it reaches 95 GFLOP/s a core where oneDNN reaches 210, at the
same accuracy. The operators are those `torch.compile` emits. They have no gradient and know no autocast, so they serve
inference only; callers keep a plain path.
"""

from __future__ import annotations

from types import MethodType

import torch
from torch import Tensor, nn

from kinetoscope.core.cpu import ONEDNN_BFLOAT16, CpuLevel, cpu_level

_AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_DTYPES = (torch.float32, torch.bfloat16) if ONEDNN_BFLOAT16 else (torch.float32,)


def onednn_serves(x: Tensor, weight: Tensor) -> bool:
    """Whether `onednn_linear` may compute `x @ weight.T` here and now.

    From AVX512 on: with AVX2 MKL was 1.2 times as fast in float32.
    """
    return (
        _AVAILABLE
        and cpu_level() >= CpuLevel.AVX512
        and x.device.type == "cpu"
        and weight.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in _DTYPES
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> Tensor:
    """x [..., in] @ weight [out, in].T + bias [out] -> [..., out], with a tanh GELU in the same pass if asked."""
    if torch.compiler.is_dynamo_compiling():
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


def speed_up_convolutions(module: nn.Module) -> nn.Module:
    """Let oneDNN compute the 3D convolutions of somebody else's module (a VAE) in inference; returns the module.

    Layers, names and parameters stay as they are, and training takes the plain path.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv3d) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
            layer._conv_forward = MethodType(_conv_forward, layer)  # pyright: ignore[reportPrivateUsage]
    return module


def _conv_forward(layer: nn.Conv3d, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`nn.Conv3d._conv_forward`, which subclasses reach through `forward`."""
    pointwise = max(layer.kernel_size) == 1  # a plain product, for which the call costs more than it saves
    if pointwise or input.ndim != 5 or torch.compiler.is_dynamo_compiling() or not onednn_serves(input, weight):
        return nn.Conv3d._conv_forward(layer, input, weight, bias)  # pyright: ignore[reportPrivateUsage]
    sizes = (list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups)
    return torch.ops.mkldnn._convolution_pointwise(input, weight, bias, *sizes, "none", [], "")
