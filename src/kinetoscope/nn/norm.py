"""Norms whose statistics are float32 whatever the dtype of the stream, and the gated residual that goes with them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.RMSNorm):
    """RMS norm that keeps the dtype of its input also where its weight has another one (as in autocast)."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]"""
        weight = self.weight
        return F.rms_norm(x, self.normalized_shape, weight.to(x.dtype) if weight is not None else None, self.eps)


class FP32LayerNorm(nn.LayerNorm):
    """Layer norm with float32 arithmetic and parameters, result in the dtype of the stream."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., d] -> [..., d]"""
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class ModulatedNorm(nn.Module):
    """Layer norm without parameters, then `x * scale + shift` given by the timestep (adaLN, arXiv 2212.09748).

    Args:
        dim: width d.
        eps: epsilon of the norm.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """x [..., d]; shift and scale float32, broadcastable to x (scale is the whole factor, 1 included) -> like x."""
        if scale.numel() == self.dim:  # one modulation for all tokens is an affine layer norm: one pass, one rounding
            return F.layer_norm(x, (self.dim,), scale.view(self.dim), shift.view(self.dim), self.eps)
        normed = F.layer_norm(x.float(), (self.dim,), None, None, self.eps)
        return torch.addcmul(shift, normed, scale).to(x.dtype)


def unit_scales(parts: int, like: Tensor) -> Tensor:
    """Return [parts, 1] with a 1 at each scale of `parts` vectors in the order (shift, scale, gate), and 0 elsewhere.

    It is made on the device of `like`, in its dtype, without a copy from the host.

    Args:
        parts: 2 (no gate), 3 or a multiple of 3.
        like: any tensor.
    """
    scale = torch.eye(3, dtype=like.dtype, device=like.device)[:, 1:2]
    return scale[:parts] if parts <= 3 else scale.repeat(parts // 3, 1)


def gated_add(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + y gate in float32, `gate` broadcastable to x and y; result in the dtype of x."""
    return torch.addcmul(x.float(), y.float(), gate).to(x.dtype)
