"""Keys and values of past frames in fixed memory, for streams of any length.

A ring instead of a list that is shifted: softmax attention does not care for the order of its keys, and positions are
in the keys already, so a frame is written where the oldest one was and nothing moves. What a block attends to is then
a view of the buffer, and memory and work of a block do not grow with the stream.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kinetoscope.core.errors import CompositionError, InputError


class RingCache(NamedTuple):
    """The first `sink` frames for ever, and of the others the newest that fit, for all layers.

    A NamedTuple, so that it travels as a row-first tree (`engine.protocols.take_rows`): a cut to some rows is a view of
    the same memory, and a forward of one branch writes that branch's part.

    Attributes:
        keys, values: [R, L, M, H, D] a layer: L places for frames of M tokens; rows first.
        sink: first frames that are never evicted.
    """

    keys: list[Tensor]
    values: list[Tensor]
    sink: int = 0

    @staticmethod
    def allocate(
        layers: int,
        shape: tuple[int, int, int, int, int],
        *,
        sink: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> RingCache:
        """All the memory a stream will use, for `shape` [R, L, M, H, D].

        Raises:
            InputError: the sink leaves no place for other frames.
        """
        if not 0 <= sink < shape[1]:
            raise InputError(f"a K/V window of {shape[1]} frames cannot keep a sink of {sink}")
        keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        return RingCache(keys, [torch.zeros_like(k) for k in keys], sink)

    @property
    def frames(self) -> int:
        """Most frames a block attends to, its own included."""
        return self.keys[0].shape[1]

    @property
    def tokens(self) -> int:
        """Tokens of a frame."""
        return self.keys[0].shape[2]

    def copy(self) -> RingCache:
        """The same past in memory of its own."""
        return RingCache([k.clone() for k in self.keys], [v.clone() for v in self.values], self.sink)

    def split_frames(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[R, F M, H, D] tokens of F frames, `grid` F, H', W' -> [R, F, M, H, D]

        Raises:
            CompositionError: they are a part of the frames' tokens.
        """
        if x.shape[1] != math.prod(grid):
            raise CompositionError("ring and a K/V cache of frames cannot be used together; use ulysses")
        return x.unflatten(1, (grid[0], self.tokens))

    def runs(self, start: int, count: int) -> list[tuple[int, int, int]]:
        """Where frames [start, start + count) of the stream are: (first frame less `start`, place, frames) each.

        Raises:
            InputError: so many new frames do not fit beside the sink.
        """
        ring = self.frames - self.sink
        if start + count > self.frames and count > ring:
            raise InputError(
                f"a block of {count} frames does not fit a K/V window of {self.frames} with a sink of {self.sink}"
            )
        places = [f if f < self.sink else self.sink + (f - self.sink) % ring for f in range(start, start + count)]
        found: list[tuple[int, int, int]] = []
        for offset, place in enumerate(places):
            if found and place == found[-1][1] + found[-1][2]:
                found[-1] = (*found[-1][:2], found[-1][2] + 1)
            else:
                found.append((offset, place, 1))
        return found

    def update(self, layer: int, keys: Tensor, values: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Remember keys and values [R, n, M, H, D] of frames from `start` on; returns what they see, [R, l, M, H, D].

        Frames written before are written over, so the steps of a block may run one after another. Frames of a stream
        come in order. Where gradients are recorded the block's own part carries them, the past does not.
        """
        runs = self.runs(start, keys.shape[1])
        filled = min(start + keys.shape[1], self.frames)
        return (
            _write(self.keys[layer], keys, runs, filled),
            _write(self.values[layer], values, runs, filled),
        )


class Layer(Protocol):
    """A module that owns one layer of a cache."""

    layer: int


class CachePlace(Protocol):
    """Which cache, and the first frame that is new."""

    @property
    def cache(self) -> RingCache | None: ...

    @property
    def start(self) -> int: ...


@torch.compiler.disable
def remember(
    owner: Layer, place: CachePlace, grid: tuple[int, int, int], keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """`RingCache.update` for a block that may be compiled: [R, F M, H, D] of F frames; [R, l M, H, D] are seen.

    Which layer, and where in the ring, are Python numbers that differ from block to block and from layer to layer; a
    graph that saw them would be compiled again for each. So they are read outside of it.
    """
    cache = place.cache
    assert cache is not None
    keys, values = cache.split_frames(keys, grid), cache.split_frames(values, grid)
    keys, values = cache.update(owner.layer, keys, values, place.start)
    return keys.flatten(1, 2), values.flatten(1, 2)


def with_own_caches(tree: Any) -> Any:
    """The same tree with copies of its caches, for a forward whose backward pass comes when the caches have been
    written on."""
    if isinstance(tree, RingCache):
        return tree.copy()
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(with_own_caches(part) for part in tree))  # pyright: ignore[reportUnknownVariableType]
    return tree  # pyright: ignore[reportUnknownVariableType]


def _write(buffer: Tensor, new: Tensor, runs: list[tuple[int, int, int]], filled: int) -> Tensor:
    for offset, place, count in runs:
        buffer[:, place : place + count] = new[:, offset : offset + count].detach()
    if not new.requires_grad:
        return buffer[:, :filled]
    pieces: list[Tensor] = []
    at = 0
    for offset, place, count in sorted(runs, key=lambda run: run[1]):
        pieces += [buffer[:, at:place], new[:, offset : offset + count]]
        at = place + count
    return torch.cat([*pieces, buffer[:, at:filled]], dim=1)
