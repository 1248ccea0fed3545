"""Embeddings of timestep, text and image features, with the parameter names of the published checkpoints."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kinetoscope.nn.feed_forward import FeedForward
from kinetoscope.nn.linear import Linear, linear_gelu
from kinetoscope.nn.norm import FP32LayerNorm


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


class ImageProjection(nn.Module):
    """Image features to the width of the model: norm, two linear layers with an exact GELU, norm."""

    def __init__(self, in_dim: int, dim: int, positions: int | None) -> None:
        super().__init__()
        self.norm1 = FP32LayerNorm(in_dim, 1e-5)
        self.ff = FeedForward(in_dim, in_dim, out_dim=dim, approximate="none")
        self.norm2 = FP32LayerNorm(dim, 1e-5)
        self.pos_embed = None if positions is None else nn.Parameter(torch.zeros(1, positions, in_dim))

    def forward(self, features: Tensor) -> Tensor:
        """[R, I, in] -> [R, I, d]"""
        if self.pos_embed is not None:
            features = features + self.pos_embed
        return self.norm2(self.ff(self.norm1(features)))


class ConditionEmbedder(nn.Module):
    """Embeddings of timestep, text and, with `image_dim`, image features."""

    def __init__(
        self, freq_dim: int, dim: int, text_dim: int, image_dim: int | None = None, image_positions: int | None = None
    ) -> None:
        super().__init__()
        self.freq_dim = freq_dim
        self.time_embedder = TimestepEmbedding(freq_dim, dim)
        self.time_proj = Linear(dim, 6 * dim)
        self.text_embedder = TextProjection(text_dim, dim)
        if image_dim is not None:
            self.image_embedder = ImageProjection(image_dim, dim, image_positions)

    def embed_time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """[R, F] -> embedding [R, F, d] and its six-way projection [R, F, 6, d]"""
        emb = self.time_embedder(sinusoidal_embedding(timestep, self.freq_dim)).to(self.time_proj.weight.dtype)
        return emb, self.time_proj(F.silu(emb)).unflatten(-1, (6, -1))
