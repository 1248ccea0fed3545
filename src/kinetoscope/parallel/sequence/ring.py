"""Attention whose keys and values go around a ring of processes (arXiv 2310.01889).

Each process has the queries of its part of the sequence, and sees the keys of one part after another; what it finds is
merged. Queries that every process has (text) it answers for its own part of the keys only, and the parts are gathered:
each is computed once, and all processes merge them in one order, to the same bits.

Its kernel is its own, since it needs the sums of the exponentials (`partial`); the chosen backend is not asked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kinetoscope.core.context import SharedAttention, Span
from kinetoscope.core.errors import CompositionError
from kinetoscope.parallel.comm import all_gather, begin_pass
from kinetoscope.parallel.groups import Group
from kinetoscope.parallel.sequence.partial import Partial, merge, partial_attention


@dataclass(slots=True)
class Part:
    """Queries that see the same keys.

    Attributes:
        q: [R, n, H, D].
        keys: they see, of the whole sequence.
        done: what was found so far.
    """

    q: Tensor
    keys: tuple[Span, ...]
    done: Partial | None = None

    def see(self, k: Tensor, v: Tensor, start: int, key_bias: Tensor | None) -> None:
        """Attend to keys of the sequence from `start` on, those of them that are seen."""
        for first, last in self.keys:
            a, b = max(first, start), min(last, start + k.shape[1])
            if a < b and self.q.shape[1]:
                bias = None if key_bias is None else key_bias[:, a:b]
                here = slice(a - start, b - start)
                self.done = merge(self.done, partial_attention(self.q, k[:, here], v[:, here], bias))

    def result(self) -> Partial:
        """What was found; of no key, nothing."""
        if self.done is not None:
            return self.done
        nothing = torch.full_like(self.q[..., :1], -torch.inf, dtype=torch.float32)
        return Partial(torch.zeros_like(self.q, dtype=torch.float32), nothing)


def ring_attention(
    call: SharedAttention, q: Tensor, k: Tensor, v: Tensor, ring: Group, tokens: int, chunk: int
) -> Tensor:
    """Attention of this process's part of the queries over all keys.

    Args:
        call: what else attention was told, of the whole sequence.
        q: [R, held + L, h, D] the part's queries, without padding, and those that every process has.
        k, v: [R, lead + held + L, h, D].
        ring: who takes part.
        tokens: N, of all parts.
        chunk: of a part, padding included.

    Returns:
        [R, held + L, h, D] in the dtype of q.

    Raises:
        CompositionError: a K/V cache, and parts of unequal size.
    """
    lead, held = call.lead, min(max(tokens - chunk * ring.index, 0), chunk)
    start, tail = chunk * ring.index, q.shape[1] - held
    k_first, k_own, k_last = k.split((lead, held, tail), dim=1)
    v_first, v_own, v_last = v.split((lead, held, tail), dim=1)
    sizes = [min(max(tokens - chunk * i, 0), chunk) for i in range(ring.size)]
    if call.memory is not None:
        if len(set(sizes)) > 1:
            raise CompositionError(
                f"ring={ring.size} and a K/V cache cannot be used together for {tokens} tokens at a time, which do not "
                "divide; use ulysses"
            )
        k_own, v_own = call.memory(k_own, v_own)
        sizes = [k_own.shape[1]] * ring.size
    total = sum(sizes)
    starts = [lead + sum(sizes[:i]) for i in range(ring.size)]

    def parts(first: int, last: int, q: Tensor) -> list[Part]:
        """Of queries [first, last) of the sequence."""
        if call.rows is None:
            return [Part(q, ((0, lead + total + tail),))]
        cut = [((max(a, first), min(b, last)), keys) for (a, b), keys in call.rows]
        return [Part(q[:, a - first : b - first], keys) for (a, b), keys in cut if a < b]

    own = parts(start, start + held, q[:, :held]) if held else []
    shared = parts(tokens, tokens + tail, q[:, held:]) if tail else []
    for part in shared:
        part.see(k_own, v_own, starts[ring.index], call.key_bias)
    size = max(sizes)
    going = [_padded(k_own, size), _padded(v_own, size)]
    for turn in range(ring.size):
        source = (ring.index - turn) % ring.size
        coming = begin_pass(going, ring) if turn < ring.size - 1 else None
        for part in own:
            part.see(going[0][:, : sizes[source]], going[1][:, : sizes[source]], starts[source], call.key_bias)
        if coming is not None:
            going = coming()
    whole = [_gathered(part, ring) for part in shared]
    for part in (*own, *whole):  # what every process has comes last, in one order everywhere
        part.see(k_first, v_first, 0, call.key_bias)
        part.see(k_last, v_last, lead + total, call.key_bias)
    out = [part.result().out for part in (*own, *whole)]
    return torch.cat(out, dim=1).to(q.dtype) if out else q


def _gathered(part: Part, ring: Group) -> Part:
    """The same queries with what all processes found."""
    found = part.result()
    each = all_gather(torch.cat([found.out, found.lse], dim=-1).unsqueeze(0), ring, 0)
    done: Partial | None = None
    for other in each:
        done = merge(done, Partial(other[..., :-1], other[..., -1:]))
    return Part(part.q, part.keys, done)


def _padded(x: Tensor, size: int) -> Tensor:
    """[R, m, H, D] -> [R, size, H, D]"""
    if x.shape[1] == size:
        return x
    return torch.cat([x, x.new_zeros(x.shape[0], size - x.shape[1], *x.shape[2:])], dim=1)
