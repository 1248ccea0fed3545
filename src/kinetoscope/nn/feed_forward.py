"""The feed-forward layer of a block, with the parameter names of the published checkpoints."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from kinetoscope.nn.linear import Linear, linear_gelu


class GELUProjection(nn.Module):
    """Linear then GELU, by its tanh form or exact."""

    def __init__(self, dim: int, hidden_dim: int, approximate: str = "tanh") -> None:
        super().__init__()
        self.proj = Linear(dim, hidden_dim)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., hidden_dim]"""
        if self.approximate == "tanh":
            return linear_gelu(self.proj, x)
        return F.gelu(self.proj(x), approximate=self.approximate)


class FeedForward(nn.Module):
    """Linear, GELU, linear. The identity at index 1 keeps the published indices (dropout, never active)."""

    def __init__(self, dim: int, hidden_dim: int, *, out_dim: int | None = None, approximate: str = "tanh") -> None:
        super().__init__()
        first = GELUProjection(dim, hidden_dim, approximate)
        self.net = nn.Sequential(first, nn.Identity(), Linear(hidden_dim, out_dim or dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., out_dim or dim]"""
        return self.net(x)
