"""Rotary position embedding whose pairs are channel i and channel i + D/2 of a head, each axis with its own base."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def halves_rope_table(positions: Sequence[Tensor], dims: Sequence[int], thetas: Sequence[float]) -> Tensor:
    """Rotations of every token of a grid, angles in float32.

    Args:
        positions: for each axis its positions, float32, [T], [H], [W].
        dims: for each axis its channels of a head, even.
        thetas: for each axis the base of its frequencies.

    Returns:
        complex64 [T*H*W, sum(dims) / 2]
    """
    grid = [len(p) for p in positions]
    parts: list[Tensor] = []
    for axis, (position, dim, theta) in enumerate(zip(positions, dims, thetas, strict=True)):
        exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=position.device) / dim
        angle = torch.outer(position.float(), 1.0 / theta**exponent)
        shape = [1] * len(grid) + [dim // 2]
        shape[axis] = grid[axis]
        parts.append(torch.polar(torch.ones_like(angle), angle).view(shape).expand(*grid, dim // 2))
    return torch.cat(parts, dim=-1).flatten(0, -2)


def apply_rope_halves(x: Tensor, table: Tensor) -> Tensor:
    """Rotate x [R, N, H, D] by `table` [N, D/2] in float32; the result has the dtype of x."""
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.complex(first, second) * table.unsqueeze(1)
    return torch.cat([rotated.real, rotated.imag], dim=-1).to(x.dtype)
