"""Patches of a video as tokens, and back: how many, their embedding and learned positions (published names)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kinetoscope.core.errors import InputError
from kinetoscope.nn.linear import Linear


class LinearPatchEmbedding(nn.Module):
    """A linear layer over the values of a patch."""

    def __init__(self, channels: int, dim: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = Linear(channels * math.prod(patch_size), dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[R, C, T, H, W] -> [R, T', H', W', d]"""
        for axis, patch in zip((2, 4, 6), self.patch_size, strict=True):
            x = x.unflatten(axis, (-1, patch))
        x = x.permute(0, 2, 4, 6, 1, 3, 5, 7)  # [R, T', H', W', C, pt, ph, pw]
        return self.proj(x.flatten(4))


class LearnedPositions(nn.Module):
    """A learned vector for each position of each axis; a token's is their sum at unit mean square."""

    def __init__(self, dim: int, sizes: tuple[int, int, int], eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.pos_emb_t = nn.Parameter(torch.zeros(sizes[0], dim))
        self.pos_emb_h = nn.Parameter(torch.zeros(sizes[1], dim))
        self.pos_emb_w = nn.Parameter(torch.zeros(sizes[2], dim))

    def forward(self, grid: tuple[int, int, int]) -> Tensor:
        """(T', H', W') -> [N, d] float32"""
        t, h, w = (p[:n].float() for p, n in zip((self.pos_emb_t, self.pos_emb_h, self.pos_emb_w), grid, strict=True))
        x = (t[:, None, None] + h[:, None] + w).flatten(0, 2)  # [N, d]
        return x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5 + self.eps)


def token_grid(
    latent_shape: Sequence[int], patch: Sequence[int], limits: Sequence[int | None] = (None, None, None)
) -> tuple[int, int, int]:
    """Tokens (T', H', W') of latents [..., T, H, W].

    Args:
        latent_shape: of the latents.
        patch: latent frames, rows and columns a token covers.
        limits: most tokens along each axis; None: any number.

    Raises:
        InputError: a size is not a multiple of the patch, or has more tokens than the limit.
    """
    grid: list[int] = []
    for axis, size, side, limit in zip("THW", latent_shape[-3:], patch, limits, strict=True):
        if size % side or size < 1 or (limit is not None and size // side > limit):
            most = "" if limit is None else f", at most {limit * side}"
            raise InputError(f"latent {axis}={size} must be a positive multiple of the patch size {side}{most}")
        grid.append(size // side)
    return grid[0], grid[1], grid[2]


def unpatchify(x: Tensor, grid: Sequence[int], patch: Sequence[int]) -> Tensor:
    """[R, ..., pt ph pw C], whose middle axes hold the tokens of `grid` (T', H', W') in order -> [R, C, T, H, W]"""
    x = x.reshape(x.shape[0], *grid, *patch, -1)
    x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # [R, C, T', pt, H', ph, W', pw]
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
