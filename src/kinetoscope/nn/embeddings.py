"""Embeddings of timestep and text, with the parameter names of the published checkpoints."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kinetoscope.nn.linear import Linear, linear_gelu


def sinusoidal_embedding(timestep: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Cosines then sines of `timestep` at geometric frequencies (arXiv 2006.11239): [...] -> [..., dim] float32."""
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timestep.device) * (-math.log(max_period)) / half
    angle = timestep.float().unsqueeze(-1) * exponent.exp()
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Two linear layers over the sinusoidal embedding, in the dtype of their own weights."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = Linear(in_dim, dim)
        self.linear_2 = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_dim] -> [..., dim]"""
        x = x.to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(x)))


class TextProjection(nn.Module):
    """Two linear layers with a tanh GELU, from the text encoder's width to the model's."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = Linear(in_dim, dim)
        self.linear_2 = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[R, L, in_dim] -> [R, L, dim]"""
        return self.linear_2(linear_gelu(self.linear_1, x))
