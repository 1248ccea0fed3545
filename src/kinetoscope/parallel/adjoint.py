"""What processes say to each other, with gradients that flow back by the same way.

Each process computes a loss of its own, and the gradient that flows back is that of the sum of all their losses. Where
all have the same batch, so the same loss, the gradient of that loss is the mean of what the processes find for their
copies of the weights: as data parallel and FSDP take it anyway.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from kinetoscope.parallel import comm
from kinetoscope.parallel.groups import Group


def recorded(*tensors: Tensor) -> bool:
    """Whether gradients are recorded, and of any of these."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def all_to_all(x: Tensor, group: Group, scatter: int, gather: int) -> Tensor:
    """See `comm.all_to_all`."""
    if group.size == 1 or not recorded(x):
        return comm.all_to_all(x, group, scatter, gather)
    return cast(Tensor, _AllToAll.apply(x, group, scatter, gather))


def all_gather(x: Tensor, group: Group, dim: int) -> Tensor:
    """See `comm.all_gather`."""
    if group.size == 1 or not recorded(x):
        return comm.all_gather(x, group, dim)
    return cast(Tensor, _AllGather.apply(x, group, dim))


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, scatter: int, gather: int) -> Tensor:
        ctx.group, ctx.scatter, ctx.gather = group, scatter, gather
        return comm.all_to_all(x, group, scatter, gather)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return comm.all_to_all(grads[0], ctx.group, ctx.gather, ctx.scatter), None, None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return comm.all_gather(x, group, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Of the own part, what each process found for it, summed."""
        found = comm.all_to_all(grads[0].unsqueeze(0), ctx.group, ctx.dim + 1, 0)  # [P, ...]
        return found.sum(0), None, None
