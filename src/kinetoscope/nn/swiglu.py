"""The gated feed-forward layer of arXiv 2002.05202, with the parameter names of the published checkpoints."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from kinetoscope.nn.linear import Linear


class SwiGLU(nn.Module):
    """w2(SiLU(w1 x) * w3 x), no biases."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = Linear(dim, hidden_dim, bias=False)
        self.w2 = Linear(hidden_dim, dim, bias=False)
        self.w3 = Linear(dim, hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]"""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))
