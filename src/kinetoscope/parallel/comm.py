"""The few things processes say to each other, with a count of what they send.

A group of one sends nothing. Every call is made by all processes of its group, in the same order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kinetoscope.parallel.groups import Group

SENT: Counter[str] = Counter()
"""Bytes this process has sent to others, by the name of the group; `SENT.clear()` starts again."""


def _count(group: Group, sent: int) -> None:
    SENT[group.name] += sent


def all_to_all(x: Tensor, group: Group, scatter: int, gather: int) -> Tensor:
    """`x` cut along `scatter` into one part a process, which get them; what came is joined along `gather`.

    `x.shape[scatter]` must divide by the size of the group.
    """
    if group.size == 1:
        return x
    parts = torch.stack(x.tensor_split(group.size, dim=scatter)).contiguous()  # [P, ...]; stacked, they keep strides
    got = torch.empty_like(parts)
    dist.all_to_all_single(got, parts, group=group.handle)
    _count(group, parts[0].nbytes * (group.size - 1))
    return torch.cat(got.unbind(0), dim=gather)


def all_gather(x: Tensor, group: Group, dim: int) -> Tensor:
    """The parts of all processes, of one shape, joined along `dim`."""
    if group.size == 1:
        return x
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(group.size)]
    dist.all_gather(parts, x, group=group.handle)
    _count(group, x.nbytes * (group.size - 1))
    return torch.cat(parts, dim=dim)


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """The sum over all processes, in place; counted as a ring sends it: twice all but one part."""
    if group.size == 1:
        return x
    dist.all_reduce(x, group=group.handle)
    _count(group, 2 * x.nbytes * (group.size - 1) // group.size)
    return x


def broadcast(x: Tensor, group: Group, source: int = 0) -> Tensor:
    """`x` of process `source` of the group, in place; the source is counted as sending it to each of the others."""
    if group.size == 1:
        return x
    dist.broadcast(x, src=group.ranks[source], group=group.handle)
    if group.index == source:
        _count(group, x.nbytes * (group.size - 1))
    return x


def tell(value: Any, group: Group) -> list[Any]:
    """The values of all processes, in their order: small, and of any kind that pickles. Not counted."""
    if group.size == 1:
        return [value]
    values: list[Any] = [None] * group.size
    dist.all_gather_object(values, value, group=group.handle)
    return values


def pass_on(tensors: Sequence[Tensor], group: Group) -> list[Tensor]:
    """Give `tensors` to the next process of the ring, and get those of the one before."""
    return begin_pass(tensors, group)()


def begin_pass(tensors: Sequence[Tensor], group: Group) -> Callable[[], list[Tensor]]:
    """`pass_on` that goes on while other work is done: what it returns waits, and gives what came."""
    if group.size == 1:
        return lambda: list(tensors)
    after, before = (group.ranks[(group.index + step) % group.size] for step in (1, -1))
    sent = [t.contiguous() for t in tensors]
    got = [torch.empty_like(t) for t in sent]
    work = [dist.P2POp(dist.isend, t, after, group.handle) for t in sent]
    work += [dist.P2POp(dist.irecv, t, before, group.handle) for t in got]
    requests = dist.batch_isend_irecv(work)
    _count(group, sum(t.nbytes for t in sent))

    def finish() -> list[Tensor]:
        for request in requests:
            request.wait()
        sent.clear()  # kept until they are sent
        return got

    return finish


def swap_rows(x: Tensor, group: Group, before: int, after: int, dim: int) -> tuple[Tensor | None, Tensor | None]:
    """The last `before` rows of the process before this one, and the first `after` of the next; None at the ends.

    All processes ask for the same numbers, and have that many rows along `dim`.
    """
    length = x.shape[dim]
    work: list[dist.P2POp] = []
    sent: list[Tensor] = []

    def meet(step: int, given: Tensor, wanted: int) -> Tensor | None:
        """Give the neighbour `given`, and get `wanted` rows."""
        if not 0 <= group.index + step < group.size:
            return None
        other = group.ranks[group.index + step]
        if given.shape[dim]:
            sent.append(given.contiguous())
            work.append(dist.P2POp(dist.isend, sent[-1], other, group.handle))
        if not wanted:
            return None
        got = torch.empty_like(x.narrow(dim, 0, wanted), memory_format=torch.contiguous_format)
        work.append(dist.P2POp(dist.irecv, got, other, group.handle))
        return got

    above = meet(-1, x.narrow(dim, 0, after), before)
    below = meet(1, x.narrow(dim, length - before, before), after)
    if work:
        for request in dist.batch_isend_irecv(work):
            request.wait()
    _count(group, sum(t.nbytes for t in sent))
    return above, below
