"""Linear layers that use the fastest matrix product of the device."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from kinetoscope.core.onednn import onednn_linear, onednn_serves


class Linear(nn.Linear):
    """`nn.Linear`; inference on a CPU goes to oneDNN."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        if type(self.weight) is nn.Parameter and onednn_serves(input, self.weight):
            return onednn_linear(input, self.weight, self.bias)
        return F.linear(input, self.weight, self.bias)


def linear_gelu(layer: nn.Module, x: Tensor) -> Tensor:
    """tanh GELU of `layer(x)`; one pass where the layer is a plain `Linear` in CPU inference."""
    if type(layer) is Linear and _is_plain(layer) and onednn_serves(x, layer.weight):
        return onednn_linear(x, layer.weight, layer.bias, gelu=True)
    return F.gelu(layer(x), approximate="tanh")


def _is_plain(layer: Linear) -> bool:
    """Whether nobody sharded, quantized or hooked the layer, so that its weight may be used without calling it. (Who is
    in its `forward` has called it, hooks included.)"""
    return type(layer.weight) is nn.Parameter and not (layer._forward_hooks or layer._forward_pre_hooks)
