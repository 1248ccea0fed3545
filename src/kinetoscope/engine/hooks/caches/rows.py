"""Rows of block calls: cut to some, and hidden states of one or several streams as one tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from kinetoscope.engine.protocols import Tree
from kinetoscope.nn.stack import BlockCall, Hidden


def tokens_of(x: Hidden) -> Tensor:
    """All tokens of a hidden state: a tensor as it is; of several streams [R, N, d] their tokens one after another."""
    return torch.cat(x, dim=1) if isinstance(x, tuple) else x


def with_tokens(tokens: Tensor, streams: tuple[int, ...] | None) -> Hidden:
    """`tokens_of` undone, for streams of so many tokens; None: they are one tensor."""
    return tokens if streams is None else torch.split(tokens, list(streams), dim=1)


def join(pieces: Sequence[Tensor]) -> Tensor:
    """Rows [1, ...] each as one tensor."""
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))


def can_cut(calls: Sequence[BlockCall], rows: int) -> bool:
    """Whether blocks can run on some of their rows.

    Not where what all rows share holds rows of its own: K/V caches, which each forward writes. Then all rows run, and
    the cached ones take what they have cached all the same: slower, never different. A shape that only looks like rows
    costs speed alone.
    """
    sizes: set[int] = set()
    for shared in {id(c.shared): c.shared for c in calls}.values():
        _map(shared, lambda t: sizes.add(t.shape[0] if t.ndim else 1))
    return not any(size > 1 and rows % size == 0 for size in sizes)


def cut_calls(
    x: Hidden, calls: Sequence[BlockCall], chosen: Sequence[int], rows: int
) -> tuple[Hidden, Sequence[BlockCall]]:
    """Hidden state and calls of the `chosen` of `rows` rows; what has one row for all keeps it."""
    if len(chosen) == rows:
        return x, calls
    start, stop = chosen[0], chosen[-1] + 1
    index = slice(start, stop) if stop - start == len(chosen) else list(chosen)

    def cut(t: Tensor) -> Tensor:
        return t if t.ndim == 0 or t.shape[0] == 1 else t[index]

    return _map(x, cut), [replace(call, rows=_map(call.rows, cut)) for call in calls]


def _map(tree: Tree, function: Callable[[Tensor], Any]) -> Tree:
    """The tree with `function` of every tensor."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {k: _map(v, function) for k, v in cast(Mapping[str, Tree], tree).items()}
    if isinstance(tree, (tuple, list)):
        parts = [_map(v, function) for v in cast(Sequence[Tree], tree)]
        if isinstance(tree, list):
            return parts
        kind = cast(Any, type(cast(object, tree)))
        return kind(*parts) if hasattr(kind, "_fields") else tuple(parts)
    return tree
