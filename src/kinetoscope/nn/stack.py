"""The one loop over a transformer's blocks, and the place where something may stand in for it (step caches).

It is also where tokens are shared out among processes (sequence parallel): a run of blocks on tokens that all processes
have computes a part of them here, and gathers. Step caches stand outside of that, so they see whole tokens and decide
alike everywhere. For it a family says of each `BlockCall` where its arguments have the tokens (`nn.split.TokenAxes`),
calls `attention` with the roles "self" or "joint" for all that mixes tokens of the video, with what it tells of the
sequence (key biases, grid, rows) whole, and keeps its blocks free of other arithmetic between tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kinetoscope.core.context import ForwardContext, current_context
from kinetoscope.core.errors import CompositionError
from kinetoscope.nn.split import Hidden, TokenAxes, TokenSplit


@dataclass(frozen=True, slots=True)
class BlockCall:
    """One block with its arguments: `block(x, **rows, **shared)`, with `x` spread out where it is a tuple.

    Attributes:
        block: a module; or a plain function between two blocks, which is no layer.
        rows: trees of tensors whose first axis is R, or 1 where all rows share them.
        shared: what is the same for all rows.
        tokens: which arguments have an entry for each token; None: a family that has not said so, or a function
            without arguments.
    """

    block: Callable[..., Hidden]
    rows: dict[str, Any] = field(default_factory=dict[str, Any])
    shared: dict[str, Any] = field(default_factory=dict[str, Any])
    tokens: TokenAxes | None = None


def run_blocks(x: Hidden, calls: Sequence[BlockCall]) -> Any:
    """The tokens after all blocks; by the context's `stack` if it has one."""
    context = current_context()
    if context is not None:
        context.blocks_ran = True
        if context.stack is not None:
            return context.stack(x, calls)
    return run_calls(x, calls)


def check_stack(context: ForwardContext, option: str, network: object) -> None:
    """Refuse an option that acts on the loop over blocks, after a forward that has run a loop of its own instead.

    Args:
        context: the one that was open during the forward.
        option: what was asked for, for the message.
        network: the transformer.

    Raises:
        CompositionError: names the option and the transformer's class.
    """
    if not context.blocks_ran:
        raise CompositionError(
            f"{option} and {type(network).__name__} cannot be used together: its forward does not run its blocks "
            "through nn.stack.run_blocks, so nothing can stand in for them"
        )


def run_calls(x: Hidden, calls: Sequence[BlockCall], first: int = 0) -> Hidden:
    """The tokens after `calls`, which begin at call number `first` of the transformer; each block is really run.

    Raises:
        CompositionError: tokens are shared out, and a block does not say which of its arguments go with them.
    """
    context = current_context()
    if context is None or context.shard is None or not calls:
        for number, call in enumerate(calls, first):
            if context is not None:
                context.layer = number
            x = _run(call, x, call.rows, call.shared)
        return x
    return _run_shared(x, calls, first, context)


def _run(call: BlockCall, x: Hidden, rows: dict[str, Any], shared: dict[str, Any]) -> Hidden:
    return call.block(*(x if isinstance(x, tuple) else (x,)), **rows, **shared)


def _run_shared(x: Hidden, calls: Sequence[BlockCall], first: int, context: ForwardContext) -> Hidden:
    """`run_calls` on this process's part of the tokens."""
    assert context.shard is not None
    axes = [_axes(call) for call in calls]
    split = TokenSplit(x, axes[0].tail, context.shard)
    x, context.share = split.x, split.share
    try:
        for number, (call, own) in enumerate(zip(calls, axes, strict=True), first):
            context.layer = number
            x = _run(call, x, split.arguments(call.rows, own), split.arguments(call.shared, own))
            split.forget()
    finally:
        context.share = None
    return split.gather(x)


def _axes(call: BlockCall) -> TokenAxes:
    if call.tokens is None and (call.rows or call.shared):
        raise CompositionError(
            f"ulysses or ring and {type(call.block).__name__} cannot be used together: its family does not say which "
            "arguments of the block have tokens (BlockCall.tokens)"
        )
    return call.tokens or TokenAxes()


def join_tokens(x: Tensor, text: Tensor) -> Tensor:
    """[R, N, d], [R, L, d] -> [R, N + L, d], from blocks of two streams to blocks of one."""
    return torch.cat([x, text], dim=1)
