"""Sums over the devices that share weights, also where gradients are recorded.

A sum in the forward has an identity for its gradient where all devices go on with the same value, and a sum where each
goes on with a part of the heads (arXiv 1909.08053 calls the first two f and g).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from kinetoscope.parallel import comm
from kinetoscope.parallel.groups import Group

P = ParamSpec("P")
R = TypeVar("R")


def _eager(function: Callable[P, R]) -> Callable[P, R]:
    """A compiled graph breaks here, since processes talk and what they send is counted."""
    return cast(Callable[P, R], torch.compiler.disable(function))


@_eager
def summed(x: Tensor, group: Group) -> Tensor:
    """The sum of all devices' parts; the result is used alike by all of them. `x` is written over."""
    return _Summed.apply(x, group) if _recorded(x) else comm.all_reduce(x, group)


@_eager
def summed_for_parts(x: Tensor, group: Group) -> Tensor:
    """The sum of all devices' parts; each goes on with heads of its own. `x` is written over."""
    return _SummedBoth.apply(x, group) if _recorded(x) else comm.all_reduce(x, group)


def spread(x: Tensor, group: Group) -> Tensor:
    """`x`, which all devices have, for each to go on with heads of its own."""
    return _spread(x, group) if _recorded(x) else x


@_eager
def joined(x: Tensor, group: Group, parts: int = 1) -> Tensor:
    """Columns of all devices side by side, [..., n] -> [..., P n]; of each of `parts` equal parts."""
    if _recorded(x):
        return _Joined.apply(x, group, parts)
    return _join(x, group, parts)


@_eager
def _spread(x: Tensor, group: Group) -> Tensor:
    return _Spread.apply(x, group)


def _recorded(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _join(x: Tensor, group: Group, parts: int) -> Tensor:
    if parts == 1:
        return comm.all_gather(x, group, dim=-1)
    x = comm.all_gather(x.unflatten(-1, (parts, -1)), group, dim=-1)
    return x.flatten(-2)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return comm.all_reduce(x.contiguous().clone(), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _SummedBoth(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return comm.all_reduce(x.contiguous().clone(), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return comm.all_reduce(grads[0].contiguous().clone(), ctx.group), None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return comm.all_reduce(grads[0].contiguous().clone(), ctx.group), None


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, parts: int) -> Tensor:
        ctx.group, ctx.parts = group, parts
        return _join(x, group, parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        own = grads[0].unflatten(-1, (ctx.parts, ctx.group.size, -1))[..., ctx.group.index, :]
        return own.flatten(-2), None, None
