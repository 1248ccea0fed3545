"""Rotary position embedding over the axes of a video (arXiv 2104.09864), adjacent channels forming a pair."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def split_rope_dims(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head given to time, height and width: a third each in whole pairs, the rest to time (Wan)."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def rope_table(positions: Sequence[Tensor], dims: Sequence[int], theta: float = 10000.0) -> Tensor:
    """Rotations of every token of a grid.

    Angles are computed in float64, as the published model does, then rounded.

    Args:
        positions: for each axis its positions, [T], [H], [W].
        dims: for each axis its channels of a head, even.
        theta: base of the frequencies.

    Returns:
        complex64 [T*H*W, sum(dims) / 2]
    """
    grid = [len(p) for p in positions]
    parts: list[Tensor] = []
    for axis, (position, dim) in enumerate(zip(positions, dims, strict=True)):
        exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=position.device) / dim
        angle = torch.outer(position.double(), 1.0 / theta**exponent)
        shape = [1] * len(grid) + [dim // 2]
        shape[axis] = grid[axis]
        parts.append(torch.polar(torch.ones_like(angle), angle).view(shape).expand(*grid, dim // 2))
    return torch.cat(parts, dim=-1).flatten(0, -2).to(torch.complex64)


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate x [R, N, H, D] by `table` [N, D/2] in float32; the result has the dtype of x."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table.unsqueeze(1)).flatten(-2).to(x.dtype)
