"""Linear layers that use the fastest matrix product of the device."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_ONEDNN_DTYPES = (torch.float32, torch.bfloat16)


class Linear(nn.Linear):
    """`nn.Linear`; inference on a CPU goes to oneDNN also in float32.

    torch's own float32 path is MKL, which takes narrow vector kernels on processors of other makers: on an AMD EPYC of
    family 26 it reaches 95 GFLOP/s a core where oneDNN reaches 210.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        if _onednn_serves(self, x):
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


def linear_gelu(layer: nn.Module, x: Tensor) -> Tensor:
    """tanh GELU of `layer(x)`; one pass where the layer is a plain `Linear` in CPU inference."""
    if _onednn_serves(layer, x):
        return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "gelu", [], "tanh")
    return F.gelu(layer(x), approximate="tanh")


def _onednn_serves(layer: nn.Module, x: Tensor) -> bool:
    """Whether `layer` is a plain `Linear`, not wrapped, sharded, hooked or trained, and oneDNN computes its dtype."""
    return (
        _ONEDNN
        and type(layer) is Linear
        and type(layer.weight) is nn.Parameter
        and x.device.type == "cpu"
        and x.dtype == layer.weight.dtype
        and x.dtype in _ONEDNN_DTYPES
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not (layer._forward_hooks or layer._forward_pre_hooks)
    )
