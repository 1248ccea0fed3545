"""Attention whose keys and values go around a ring of processes (arXiv 2310.01889).

Each process has the queries of its part of the sequence, and sees the keys of one part after another; what it finds is
merged. Queries that every process has (text) it answers for its own part of the keys only, and the parts are gathered:
each is computed once, and all processes merge them in one order, to the same bits.

Its kernel is its own, since it needs the sums of the exponentials (`partial`); the chosen backend is not asked. Where
gradients are recorded, keys and values go around once more, and what each process finds for them goes along.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from kinetoscope.core.context import Rows, SharedAttention, Span
from kinetoscope.core.errors import CompositionError
from kinetoscope.parallel.adjoint import recorded
from kinetoscope.parallel.comm import all_gather, all_reduce, begin_pass, pass_on
from kinetoscope.parallel.groups import Group
from kinetoscope.parallel.sequence.partial import Partial, merge, partial_attention, partial_gradient


class Keys(NamedTuple):
    """Keys and values of one place, [R, m, h, D] each, from token `start` of the sequence on."""

    k: Tensor
    v: Tensor
    start: int

    def seen(self, spans: tuple[Span, ...]) -> Iterator[tuple[slice, Span]]:
        """Of each span, what is here: where here, and where in the sequence."""
        for first, last in spans:
            a, b = max(first, self.start), min(last, self.start + self.k.shape[1])
            if a < b:
                yield slice(a - self.start, b - self.start), (a, b)


@dataclass(slots=True)
class Part:
    """Queries that see the same keys.

    Attributes:
        q: [R, n, h, D].
        spans: of the keys that they see.
        key_bias: [R, M] of the whole sequence.
        done: what was found so far.
    """

    q: Tensor
    spans: tuple[Span, ...]
    key_bias: Tensor | None
    done: Partial | None = None

    def see(self, keys: Keys) -> None:
        """Attend to those keys that are seen."""
        for here, (a, b) in keys.seen(self.spans) if self.q.shape[1] else ():
            bias = None if self.key_bias is None else self.key_bias[:, a:b]
            self.done = merge(self.done, partial_attention(self.q, keys.k[:, here], keys.v[:, here], bias))

    def result(self) -> Partial:
        """What was found; of no key, nothing."""
        if self.done is not None:
            return self.done
        nothing = torch.full_like(self.q[..., :1], -torch.inf, dtype=torch.float32)
        return Partial(torch.zeros_like(self.q, dtype=torch.float32), nothing)

    def look_back(self, keys: Keys, grad: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Add to the gradients of the queries and of these keys and values, for `grad` of the whole result."""
        for here, (a, b) in keys.seen(self.spans) if self.q.shape[1] else ():
            bias = None if self.key_bias is None else self.key_bias[:, a:b]
            found = partial_gradient(self.q, keys.k[:, here], keys.v[:, here], bias, self.result(), grad)
            for total, own in zip((dq, dk[:, here], dv[:, here]), found, strict=True):
                total += own


@dataclass(frozen=True, slots=True)
class Ring:
    """One attention among the processes of a ring.

    Attributes:
        group: of them.
        start, held: the queries of this process.
        tokens, tail: N queries of all processes, and those after them that every process has.
        lead: keys before those that go around, which every process has.
        sizes: keys of each process.
        rows: which queries see which keys; None: all see all.
        key_bias: [R, M].
    """

    group: Group
    start: int
    held: int
    tokens: int
    tail: int
    lead: int
    sizes: tuple[int, ...]
    rows: Rows | None
    key_bias: Tensor | None

    def parts(self, q: Tensor) -> tuple[list[Part], list[Part]]:
        """Of this process's queries, and of those that every process has."""
        own, last = q[:, : self.held], q[:, self.held :]
        return self._cut(self.start, own), self._cut(self.tokens, last)

    def _cut(self, first: int, q: Tensor) -> list[Part]:
        """Of queries from `first` of the sequence on."""
        last = first + q.shape[1]
        if first == last:
            return []
        if self.rows is None:
            return [Part(q, ((0, self.lead + sum(self.sizes) + self.tail),), self.key_bias)]
        cut = [((max(a, first), min(b, last)), spans) for (a, b), spans in self.rows]
        return [Part(q[:, a - first : b - first], spans, self.key_bias) for (a, b), spans in cut if a < b]

    def first_of(self, process: int) -> int:
        """Where its keys begin."""
        return self.lead + sum(self.sizes[:process])

    def everywhere(self, keys: tuple[Tensor, ...]) -> tuple[Keys, Keys]:
        """Those that every process has."""
        k_first, _, k_last, v_first, _, v_last = keys
        return Keys(k_first, v_first, 0), Keys(k_last, v_last, self.first_of(self.group.size))

    def around(self, turn: int) -> tuple[int, int]:
        """Whose keys are here in a turn: which process's, and how many."""
        source = (self.group.index - turn) % self.group.size
        return source, self.sizes[source]

    def attend(self, q: Tensor, keys: tuple[Tensor, ...]) -> list[Part]:
        """The parts of `q` [R, held + L, h, D] in order, with what they found among
        keys (first, own, last) and values (first, own, last)."""
        own, shared = self.parts(q)
        mine = Keys(keys[1], keys[4], self.first_of(self.group.index))
        for part in shared:
            part.see(mine)
        going = [_padded(x, max(self.sizes)) for x in mine[:2]]
        for turn in range(self.group.size):
            source, size = self.around(turn)
            coming = begin_pass(going, self.group) if turn < self.group.size - 1 else None
            for part in own:
                part.see(Keys(going[0][:, :size], going[1][:, :size], self.first_of(source)))
            if coming is not None:
                going = coming()
        for part in shared:
            part.done = _gathered(part.result(), self.group)
        for part in (*own, *shared):  # what every process has comes last, in one order everywhere
            for those in self.everywhere(keys):
                part.see(those)
        return [*own, *shared]

    def look_back(
        self, grad: Tensor, q: Tensor, keys: tuple[Tensor, ...], found: Partial
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Gradients of the queries and of `keys`, of the sum of all processes' losses.

        Args:
            grad: of what `attend` found.
            q, keys: its arguments.
            found: all of it.
        """
        own, shared = self.parts(q)
        sizes = [part.q.shape[1] for part in (*own, *shared)]
        dq = torch.zeros_like(q, dtype=torch.float32)
        dkeys = tuple(torch.zeros_like(x, dtype=torch.float32) for x in keys)
        split = [x.split(sizes, 1) for x in (dq, grad, *found)] if sizes else [()] * 4
        for part, out, lse in zip((*own, *shared), *split[2:], strict=True):
            part.done = Partial(out, lse)
        for those, dk, dv in zip(self.everywhere(keys), dkeys[0:3:2], dkeys[3:6:2], strict=True):
            for part, dpart, gpart in zip((*own, *shared), *split[:2], strict=True):
                part.look_back(those, gpart, dpart, dk, dv)
        mine = Keys(keys[1], keys[4], self.first_of(self.group.index))
        if shared:  # whose results of this process's keys all processes used
            wanted = all_reduce(grad[:, self.held :].contiguous(), self.group).split(sizes[len(own) :], 1)
            for part, dpart, gpart in zip(shared, split[0][len(own) :], wanted, strict=True):
                part.look_back(mine, gpart, dpart, dkeys[1], dkeys[4])
        most = max(self.sizes)
        going = [_padded(x, most) for x in (*mine[:2], dkeys[1], dkeys[4])]
        for turn in range(self.group.size):
            source, size = self.around(turn)
            k, v, dk, dv = (x[:, :size] for x in going)
            for part, dpart, gpart in zip(own, split[0], split[1], strict=False):
                part.look_back(Keys(k, v, self.first_of(source)), gpart, dpart, dk, dv)
            going = pass_on(going, self.group)  # after the last turn they are home
        dk, dv = (x[:, : self.sizes[self.group.index]] for x in going[2:])
        return dq, (dkeys[0], dk, dkeys[2], dkeys[3], dv, dkeys[5])


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ring: Ring, q: Tensor, *keys: Tensor) -> Tensor:
        found = _joined(q, ring.attend(q, keys))
        ctx.ring = ring
        ctx.save_for_backward(q, *found, *keys)
        return found.out.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, out, lse, *keys = ctx.saved_tensors
        dq, dkeys = ctx.ring.look_back(grads[0].float(), q, tuple(keys), Partial(out, lse))
        return (None, *(d.to(x.dtype) for d, x in zip((dq, *dkeys), (q, *keys), strict=True)))


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
    sizes = tuple(min(max(tokens - chunk * i, 0), chunk) for i in range(ring.size))
    held = sizes[ring.index]
    tail = q.shape[1] - held
    k_first, k_own, k_last = k.split((call.lead, held, tail), dim=1)
    v_first, v_own, v_last = v.split((call.lead, held, tail), dim=1)
    if call.memory is not None:
        if len(set(sizes)) > 1:
            raise CompositionError(
                f"ring={ring.size} and a K/V cache cannot be used together for {tokens} tokens at a time, which do not "
                "divide; use ulysses"
            )
        k_own, v_own = call.memory(k_own, v_own)
        sizes = (k_own.shape[1],) * ring.size
    one = Ring(ring, chunk * ring.index, held, tokens, tail, call.lead, sizes, call.rows, call.key_bias)
    keys = (k_first, k_own, k_last, v_first, v_own, v_last)
    if recorded(q, k, v):
        return cast(Tensor, _Attend.apply(one, q, *keys))
    return _joined(q, one.attend(q, keys)).out.to(q.dtype)


def _joined(q: Tensor, parts: list[Part]) -> Partial:
    """What all queries found."""
    if not parts:
        return Partial(q.float(), q[..., :1].float())
    results = [part.result() for part in parts]
    return Partial(torch.cat([r.out for r in results], dim=1), torch.cat([r.lse for r in results], dim=1))


def _gathered(found: Partial, ring: Group) -> Partial:
    """What all processes found for the same queries."""
    each = all_gather(torch.cat([found.out, found.lse], dim=-1).unsqueeze(0), ring, 0)
    done = Partial(each[0, ..., :-1], each[0, ..., -1:])
    for other in each[1:]:
        done = merge(done, Partial(other[..., :-1], other[..., -1:]))
    return done


def _padded(x: Tensor, size: int) -> Tensor:
    """[R, m, H, D] -> [R, size, H, D]"""
    if x.shape[1] == size:
        return x
    return torch.cat([x, x.new_zeros(x.shape[0], size - x.shape[1], *x.shape[2:])], dim=1)
