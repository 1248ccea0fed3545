"""Who has which tokens.

All processes have equally many, n, the last of them maybe padding. Nothing is masked for it: padding is at the end of
the sequence, and is cut off wherever tokens of several processes meet, so that attention sees as many keys as there
are. Text and other tokens that every process has are computed by each, to the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kinetoscope.core.context import SharedAttention
from kinetoscope.core.errors import CompositionError
from kinetoscope.parallel.adjoint import all_gather
from kinetoscope.parallel.groups import Group, Groups
from kinetoscope.parallel.sequence.ring import ring_attention
from kinetoscope.parallel.sequence.ulysses import Heads


@dataclass(frozen=True, slots=True, eq=False)
class SequenceShard:
    """The processes that share the tokens of a row: `ring` outside, `ulysses` inside; `sequence` is both together."""

    sequence: Group
    ring: Group
    ulysses: Group

    @classmethod
    def of(cls, groups: Groups) -> SequenceShard:
        """The processes of a layout."""
        return cls(groups.sequence, groups.ring, groups.ulysses)

    def share(self, tokens: int) -> Share:
        """This process's part of `tokens`."""
        return Share(self, tokens, -(-tokens // self.sequence.size))


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """This process's part of a video's `tokens`: `own` of them, the same number everywhere, padding included."""

    shard: SequenceShard
    tokens: int
    own: int

    @property
    def start(self) -> int:
        """The first of them."""
        return self.own * self.shard.sequence.index

    def take(self, x: Tensor, axis: int) -> Tensor:
        """The own part of the first `tokens` entries along `axis`, padded with zeros, and all of what follows them."""
        real = min(max(self.tokens - self.start, 0), self.own)
        parts = [x.narrow(axis, min(self.start, self.tokens), real)]
        if real < self.own:
            shape = [*x.shape]
            shape[axis] = self.own - real
            parts.append(x.new_zeros(shape))
        if x.shape[axis] > self.tokens:
            parts.append(x.narrow(axis, self.tokens, x.shape[axis] - self.tokens))
        return torch.cat(parts, dim=axis)  # memory of its own: matrix products round by its alignment

    def gather(self, x: Tensor, axis: int) -> Tensor:
        """The parts of all processes, without padding."""
        return all_gather(x, self.shard.sequence, axis).narrow(axis, 0, self.tokens)

    def attend(self, call: SharedAttention) -> Tensor:
        """Attention over the tokens of all processes: [R, n + L, H, D].

        Raises:
            CompositionError: a sparse kind under ring.
        """
        ring = self.shard.ring
        if ring.size > 1 and call.sparse:
            raise CompositionError(
                f"ring and attention {call.sparse!r} cannot be used together: the kind needs all tokens in one place; "
                "use ulysses"
            )
        chunk = self.own * self.shard.ulysses.size  # tokens of one place in the ring
        held = min(max(self.tokens - chunk * ring.index, 0), chunk)
        heads = Heads(self.shard.ulysses, call.q.shape[2], self.own, held)
        q = heads.spread(call.q)
        k, v = heads.spread(call.k, call.lead), heads.spread(call.v, call.lead)
        if ring.size > 1:
            out = ring_attention(call, q, k, v, ring, self.tokens, chunk)
        else:
            if call.memory is not None:
                k, v = call.memory(k, v)
            gate = None if call.gate is None else heads.spread(call.gate)
            out = call.local(q, k, v, call.key_bias, call.rows, gate)
        return heads.collect(out)
