"""A process's part of the tokens that blocks run on, and of the arguments that go with them (sequence parallel).

What a family declares is `TokenAxes`: which arguments of a block have an entry for each token, and which one for each
modulation group. All others are whole in every process: text, biases of keys, grids, what attention is told of the
whole sequence.

x is [R, N, d], or [R, F, M, d] in F groups of M tokens with a modulation each. A process has n consecutive tokens,
which may begin and end within a group. So its x is [R, n / g, g, d], where g is the largest number of tokens that
divides both n and M: then no group of g crosses a border, and each takes the modulation of the one that it lies in.
Where groups do divide among the processes, g is M.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from kinetoscope.core.context import TokenShard, TokenShare
from kinetoscope.core.errors import CompositionError

Hidden = Tensor | tuple[Tensor, ...]
"""What goes from block to block: [R, ...] tokens of the video, or those and the tokens of the text."""


@dataclass(frozen=True, slots=True)
class TokenAxes:
    """Where the arguments of a block have the tokens. A name with dots reaches into a NamedTuple ("place.table").

    Attributes:
        each: argument -> its axis of one entry a token: N, or N and those of the tail.
        groups: argument -> its axis of one entry a modulation group: F, or 1 for all tokens.
        leading: arguments that count leading tokens of the video.
        tail: the last tokens of x, where x is one tensor, that are no tokens of the video (text): every process has
            them. Where x is a tuple, all but its first tensor are such.
    """

    each: Mapping[str, int] = field(default_factory=dict[str, int])
    groups: Mapping[str, int] = field(default_factory=dict[str, int])
    leading: tuple[str, ...] = ()
    tail: int = 0


class TokenSplit:
    """One run of blocks over a part of the tokens.

    Args:
        x: tokens that enter, of all processes.
        tail: see `TokenAxes`.
        shard: who shares them.
    """

    def __init__(self, x: Hidden, tail: int, shard: TokenShard) -> None:
        video, *text = x if isinstance(x, tuple) else (x,)
        self.shape = video.shape
        self.tail = sum(t.shape[1] for t in text) or tail
        tokens = math.prod(video.shape[1:-1]) - (0 if text else tail)
        self.share: TokenShare = shard.share(tokens)
        own = self.share.take(video.flatten(1, -2), 1)
        if video.ndim == 4:
            own = own.unflatten(1, (-1, self._group(video.shape[1])))
        self.x: Hidden = (own, *text) if text else own
        self._taken: dict[tuple[int, int, bool], tuple[Tensor, Tensor]] = {}

    def _group(self, count: int) -> int:
        """g, for `count` groups of the whole video."""
        return self.share.own if count == 1 else math.gcd(self.share.own, self.share.tokens // count)

    def arguments(self, given: Mapping[str, Any], axes: TokenAxes) -> dict[str, Any]:
        """This process's part of a block's arguments."""
        found = dict(given)
        for names, grouped in ((axes.each, False), (axes.groups, True)):
            for name, axis in names.items():
                _change(found, name, lambda t, axis=axis, grouped=grouped: self._part(t, axis, grouped))
        for name in axes.leading:
            _change(found, name, lambda count: min(max(count - self.share.start, 0), self.share.own))
        return found

    def _part(self, value: Any, axis: int, grouped: bool) -> Any:
        """The own entries of a tensor, kept for the blocks that are given the same one."""
        if not isinstance(value, Tensor):
            raise CompositionError(f"ulysses or ring: a {type(value).__name__} among arguments has no tokens to share")
        if grouped and value.shape[axis] == 1:
            return value
        key = (id(value), axis, grouped)
        if key not in self._taken:
            part = self._groups(value, axis) if grouped else self.share.take(value, axis)
            self._taken[key] = (value, part)  # with the value, or its id might become another's
        return self._taken[key][1]

    def _groups(self, value: Tensor, axis: int) -> Tensor:
        """[..., F, ...] -> [..., n / g, ...]"""
        share, count = self.share, value.shape[axis]
        size = self._group(count)
        first = torch.arange(share.start, share.start + share.own, size, device=value.device)
        return value.index_select(axis, (first // (share.tokens // count)).clamp_(max=count - 1))

    def forget(self) -> None:
        """Let go of the arguments of a block that was run, except what all blocks share."""
        self._taken = {k: pair for k, pair in self._taken.items() if not k[2]}

    def gather(self, x: Hidden) -> Hidden:
        """The tokens of all processes, in the shape that entered."""
        if isinstance(x, tuple):
            return (self._whole(x[0]), *x[1:])
        if not self.tail:
            return self._whole(x)
        own = self.share.own
        return torch.cat([self.share.gather(x[:, :own], 1), x[:, own:]], dim=1)

    def _whole(self, x: Tensor) -> Tensor:
        whole = self.share.gather(x.flatten(1, -2), 1)
        return whole.unflatten(1, self.shape[1:-1]) if x.ndim == 4 else whole


def _change(tree: dict[str, Any], name: str, change: Any) -> None:
    """Replace `tree[name]`, or what dots in the name reach in a NamedTuple, if it is there."""
    name, _, rest = name.partition(".")
    value = tree.get(name)
    if value is None:
        return
    if not rest:
        tree[name] = change(value)
        return
    inner = cast(Any, value)._asdict()
    _change(inner, rest, change)
    tree[name] = type(value)(**inner)
