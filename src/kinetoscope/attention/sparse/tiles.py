"""Tokens of a video in tiles: a tile is a box of the grid; boxes at the far borders may be smaller.

R rows, H heads, N = T H W tokens in the order of the grid, U tiles of B slots, D channels. A tile's tokens fill its
first slots; slots that are left hold a copy of some token and are hidden by `TileLayout.bias`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

Triple = tuple[int, int, int]


@dataclass(frozen=True, slots=True, eq=False)
class TileLayout:
    """Where the tokens of a grid are when they stand tile by tile.

    Attributes:
        grid: tokens along time, height, width.
        tile: sizes of a whole tile, at most those of the grid.
        counts: tiles along each axis.
        gather: [U, B] token in each slot.
        position: [N] slot of each token.
        sizes: [U] tokens of each tile.
        bias: [U, B] float32, 0 for slots that hold a token and -inf for others; None where all tiles are whole.
    """

    grid: Triple
    tile: Triple
    counts: Triple
    gather: Tensor
    position: Tensor
    sizes: Tensor
    bias: Tensor | None

    @property
    def tokens(self) -> int:
        """N."""
        return math.prod(self.grid)

    def split(self, x: Tensor) -> Tensor:
        """[R, N, H, D] -> [R, H, U, B, D]"""
        return x.transpose(1, 2)[:, :, self.gather.flatten()].unflatten(2, self.gather.shape)

    def join(self, x: Tensor) -> Tensor:
        """[R, H, U, B, D] -> [R, N, H, D]"""
        return x.flatten(2, 3)[:, :, self.position].transpose(1, 2)

    def mean(self, x: Tensor) -> Tensor:
        """Float32 mean over the tokens of each tile: [R, H, U, B, D] -> [R, H, U, D]"""
        if self.bias is None:
            return x.float().mean(3)
        return (x.float() * (self.bias == 0).unsqueeze(-1)).sum(3) / self.sizes.unsqueeze(-1)

    def key_bias(self, key_bias: Tensor | None) -> Tensor | None:
        """[R, N] added to the logits of tokens, or None -> [R or 1, U, B] added to those of slots, or None"""
        if key_bias is None:
            return None if self.bias is None else self.bias.unsqueeze(0)
        slots = key_bias.float()[:, self.gather]
        return slots if self.bias is None else slots + self.bias


@lru_cache(maxsize=64)
def tile_layout(grid: Triple, tile: Triple, device: torch.device) -> TileLayout:
    """The layout of a grid in tiles of a size; kept, so that all layers and steps share it."""
    size: Triple = (min(grid[0], tile[0]), min(grid[1], tile[1]), min(grid[2], tile[2]))
    counts: Triple = (-(-grid[0] // size[0]), -(-grid[1] // size[1]), -(-grid[2] // size[2]))
    tiles, slots = math.prod(counts), math.prod(size)
    axes = [torch.arange(n) for n in grid]
    t, h, w = (a.flatten() for a in torch.meshgrid(*axes, indexing="ij"))  # [N] each
    owner = ((t // size[0]) * counts[1] + h // size[1]) * counts[2] + w // size[2]  # [N] tile of each token
    order = owner.argsort(stable=True)  # tokens tile by tile, in the grid's order inside
    sizes = owner.bincount(minlength=tiles)  # [U]
    starts = sizes.cumsum(0) - sizes
    slot = torch.arange(slots)
    held = slot < sizes.unsqueeze(1)  # [U, B]
    gather = order[starts.unsqueeze(1) + torch.where(held, slot, 0)]
    position = torch.empty_like(owner)
    position[order] = torch.arange(tiles * slots).view(tiles, slots)[held]
    bias = None if bool(held.all()) else torch.where(held, 0.0, -math.inf)
    return TileLayout(
        grid, size, counts, gather.to(device), position.to(device), sizes.to(device),
        None if bias is None else bias.to(device),
    )  # fmt: skip
