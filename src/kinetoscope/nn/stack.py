"""The one loop over a transformer's blocks, and the place where something may stand in for it (step caches)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kinetoscope.core.context import current_context

Hidden = Tensor | tuple[Tensor, ...]
"""What goes from block to block: [R, ...] tokens of the video, or those and the tokens of the text."""


@dataclass(frozen=True, slots=True)
class BlockCall:
    """One block with its arguments: `block(x, **rows, **shared)`, with `x` spread out where it is a tuple.

    Attributes:
        block: a module; or a plain function between two blocks, which is no layer.
        rows: trees of tensors whose first axis is R, or 1 where all rows share them.
        shared: what is the same for all rows.
    """

    block: Callable[..., Hidden]
    rows: dict[str, Any] = field(default_factory=dict[str, Any])
    shared: dict[str, Any] = field(default_factory=dict[str, Any])


def run_blocks(x: Hidden, calls: Sequence[BlockCall]) -> Any:
    """The tokens after all blocks; by the context's `stack` if it has one."""
    context = current_context()
    if context is not None and context.stack is not None:
        return context.stack(x, calls)
    return run_calls(x, calls)


def run_calls(x: Hidden, calls: Sequence[BlockCall], first: int = 0) -> Hidden:
    """The tokens after `calls`, which begin at call number `first` of the transformer; each block is really run."""
    context = current_context()
    for number, call in enumerate(calls, first):
        if context is not None:
            context.layer = number
        x = call.block(*(x if isinstance(x, tuple) else (x,)), **call.rows, **call.shared)
    return x


def join_tokens(x: Tensor, text: Tensor) -> Tensor:
    """[R, N, d], [R, L, d] -> [R, N + L, d], from blocks of two streams to blocks of one."""
    return torch.cat([x, text], dim=1)
