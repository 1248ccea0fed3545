"""The feed-forward layer of a block, with the parameter names of the published checkpoints."""

from __future__ import annotations

from torch import Tensor, nn

from kinetoscope.nn.linear import Linear, linear_gelu


class GELUProjection(nn.Module):
    """Linear then tanh GELU."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.proj = Linear(dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., hidden_dim]"""
        return linear_gelu(self.proj, x)


class FeedForward(nn.Module):
    """Linear, tanh GELU, linear. The identity at index 1 keeps the published indices (dropout, never active)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GELUProjection(dim, hidden_dim), nn.Identity(), Linear(hidden_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]"""
        return self.net(x)
