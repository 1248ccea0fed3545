"""Block-causal attention over whole videos: blocks of frames see themselves and earlier ones.

It is what a model that makes a video block by block, with keys and values of earlier blocks in a `RingCache`, is
trained with: one forward of all blocks, each seeing what it would find in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kinetoscope.core.errors import InputError

Span = tuple[int, int]
"""Consecutive frames or tokens [start, stop)."""


class BlockRows(NamedTuple):
    """Consecutive queries and the keys they attend to."""

    queries: Span
    keys: tuple[Span, ...]


def visible_frames(start: int, stop: int, window: int, sink: int) -> tuple[Span, ...]:
    """The frames that a block of frames [start, stop) attends to: sink and newest, `window` in all (-1: all)."""
    if window == -1 or stop <= window:
        return ((0, stop),)
    newest = (stop - window + sink, stop)
    return ((0, sink), newest) if sink else (newest,)


def block_causal_rows(blocks: Sequence[int], window: int = -1, sink: int = 0) -> tuple[BlockRows, ...]:
    """Block-causal attention over a whole video, in frames: each block attends to itself and to earlier ones."""
    rows: list[BlockRows] = []
    start = 0
    for size in blocks:
        stop = start + size
        rows.append(BlockRows((start, stop), visible_frames(start, stop, window, sink)))
        start = stop
    return tuple(rows)


def teacher_forcing_rows(blocks: Sequence[int], window: int = -1, sink: int = 0) -> tuple[BlockRows, ...]:
    """Attention over [clean | noisy], in frames: clean is block-causal, noisy blocks see themselves and of the clean
    past what their clean counterparts see."""
    total, clean = sum(blocks), block_causal_rows(blocks, window, sink)
    noisy: list[BlockRows] = []
    for (start, stop), seen in clean:
        past = tuple((first, min(last, start)) for first, last in seen if first < start)
        noisy.append(BlockRows((total + start, total + stop), (*past, (total + start, total + stop))))
    return (*clean, *noisy)


def rows_of_forward(
    frames: int, blocks: Sequence[int] | None, window: int, sink: int, *, clean: bool = False, remembers: bool = False
) -> tuple[BlockRows, ...] | None:
    """Which of the `frames` given, twice as many with `clean`, attend to which; None: all to all.

    Args:
        blocks: sizes of the blocks; None: one block.
        window, sink: frames that a block attends to, and those of them that are the first; -1: all.
        clean: the frames come twice, [clean | noisy] (teacher forcing).
        remembers: the forward reads earlier frames from a cache.

    Raises:
        InputError: blocks that are not the frames; a cache together with several blocks or with clean frames.
    """
    if blocks is not None and (sum(blocks) != frames or min(blocks) < 1):
        raise InputError(f"blocks of {list(blocks)} frames are not the {frames} latent frames given")
    if remembers and (blocks is not None or clean):
        raise InputError("a forward with a cache takes one block; give either the cache or blocks and clean frames")
    if clean:
        return teacher_forcing_rows(blocks or (frames,), window, sink)
    return None if blocks is None else block_causal_rows(blocks, window, sink)


def in_tokens(rows: Sequence[BlockRows] | None, queries: int, keys: int | None = None) -> tuple[BlockRows, ...] | None:
    """Rows of frames as rows of tokens, of which a frame has `queries` that attend and `keys` (None: as many) that are
    attended to."""
    if rows is None:
        return None
    each = queries if keys is None else keys
    return tuple(BlockRows(_times(q, queries), tuple(_times(k, each) for k in seen)) for q, seen in rows)


def join_times(clean: Tensor | None, noisy: Tensor, frames: int) -> Tensor:
    """Timesteps [R] or [R, T] of both halves of [clean | noisy] (clean None: 0) -> [R, 2 T]"""
    both = [torch.zeros_like(noisy) if clean is None else clean, noisy]
    return torch.cat([t if t.ndim == 2 else t.unsqueeze(1).expand(-1, frames) for t in both], dim=1)


def _times(span: Span, count: int) -> Span:
    return span[0] * count, span[1] * count
