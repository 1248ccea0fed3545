"""Keys and values of past tokens, for models that make a video block after block.

A cache is a value: nothing is written in place. The steps of a block read it, and only the pass over the finished block
makes a longer one, so interleaved runs, snapshots and gradients need no care. It is a NamedTuple, so that it travels as
a row-first tree (`engine.protocols.take_rows` cuts its tensors and leaves its numbers).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kinetoscope.core.errors import InputError


class KVCache(NamedTuple):
    """What one attention layer remembers: the first `sink` tokens for ever, of the others the newest that fit.

    A block of n tokens attends to [sink | newest | own block], at most `capacity` tokens with its own: the rolling
    window of self-forcing (arXiv 2506.08009) with the attention sink of arXiv 2309.17453.

    Attributes:
        keys, values: [R, ..., L, H, D], L tokens remembered, oldest first; rows first.
        capacity: most tokens a block attends to, its own included; None: no bound.
        sink: first tokens that are never evicted.
        end: position after the newest token ever remembered, in tokens of the whole video.
    """

    keys: Tensor
    values: Tensor
    capacity: int | None = None
    sink: int = 0
    end: int = 0

    @staticmethod
    def empty(
        rows: Sequence[int],
        heads: int,
        head_dim: int,
        *,
        capacity: int | None = None,
        sink: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> KVCache:
        """A cache that remembers nothing, for leading axes `rows` (R alone, or R and positions).

        Raises:
            InputError: a sink that leaves no room for anything else.
        """
        if capacity is not None and not 0 <= sink < capacity:
            raise InputError(f"a K/V cache of {capacity} tokens cannot keep a sink of {sink}")
        nothing = torch.empty((*rows, 0, heads, head_dim), dtype=dtype, device=device)
        return KVCache(nothing, nothing, capacity, sink)

    def join(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What a block attends to: its own keys and values [R, ..., n, H, D] after those remembered that still fit.

        Raises:
            InputError: the block alone does not fit beside the sink.
        """
        new, held = keys.shape[-3], self.keys.shape[-3]
        if self.capacity is None or held + new <= self.capacity:
            return torch.cat([self.keys, keys], dim=-3), torch.cat([self.values, values], dim=-3)
        tail = self.capacity - new - self.sink
        if tail < 0:
            raise InputError(
                f"a block of {new} tokens does not fit a K/V window of {self.capacity} with a sink of {self.sink}"
            )
        rolled = held - tail
        return (
            torch.cat([self.keys[..., : self.sink, :, :], self.keys[..., rolled:, :, :], keys], dim=-3),
            torch.cat([self.values[..., : self.sink, :, :], self.values[..., rolled:, :, :], values], dim=-3),
        )

    def append(self, keys: Tensor, values: Tensor) -> KVCache:
        """The cache after a block of keys and values [R, ..., n, H, D]; as `join`."""
        joined = self.join(keys, values)
        return KVCache(*joined, self.capacity, self.sink, self.end + keys.shape[-3])
