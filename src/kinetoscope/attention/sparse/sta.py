"""Sliding tile attention, STA (arXiv 2502.04507): a tile of queries sees the tiles in a window around it."""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar, cast

import torch
from torch import Tensor

from kinetoscope.attention.parameters import Parameters
from kinetoscope.attention.sparse.base import SparseAttention
from kinetoscope.attention.sparse.context import AttentionContext
from kinetoscope.attention.sparse.reference import sta_mask
from kinetoscope.attention.sparse.tiles import Triple


class SlidingTileAttention(SparseAttention):
    """`sta:window=3,3,3,tile=6,8,8`: window in tiles and tile in tokens, along time, height, width.

    At a border the window moves inside the grid, so that every query sees as many tiles.
    """

    kind: ClassVar[str] = "sta"
    lossy: ClassVar[str] = "keys outside a window of tiles are dropped (arXiv 2502.04507)"
    kernels: ClassVar[tuple[str, ...]] = ("blocks", "flex", "triton", "reference")
    ramps: ClassVar[bool] = False

    def read(self, given: Parameters) -> None:
        """`window` and `tile`."""
        self.window = cast(Triple, given.sizes("window", (3, 3, 3)))
        self.size = cast(Triple, given.sizes("tile", (6, 8, 8)))

    def tile(self, grid: Triple, layer: int) -> Triple:
        """The same in all blocks."""
        return self.size

    def attend(self, context: AttentionContext, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None) -> Tensor:
        """By tiles."""
        return self._tiles(context, q, k, v, key_bias, window_tiles(context.layout.counts, self.window, q.device))

    def mask(self, context: AttentionContext, q: Tensor, k: Tensor) -> Tensor:
        """From the places of the tokens."""
        return sta_mask(context.grid, self.size, self.window)


@lru_cache(maxsize=64)
def window_tiles(counts: Triple, window: Triple, device: torch.device) -> Tensor:
    """[1, 1, U, S] the tiles in the window of each tile."""
    axes: list[Tensor] = []
    for count, width in zip(counts, window, strict=True):
        width = min(width, count)
        first = (torch.arange(count) - width // 2).clamp(0, count - width)
        axes.append(first.unsqueeze(1) + torch.arange(width))  # [count, width]
    t, h, w = axes
    along_h = counts[2] * h.view(1, h.shape[0], 1, 1, -1, 1)
    along_t = counts[1] * counts[2] * t.view(t.shape[0], 1, 1, -1, 1, 1)
    index = along_t + along_h + w.view(1, 1, w.shape[0], 1, 1, -1)
    return index.flatten(3).flatten(0, 2)[None, None].to(device)
