"""What a forward pass may know besides its arguments.

The engine pushes a `ForwardContext` around each forward; leaves such as attention read the top of the stack. It is a
plain module-level list because `ContextVar.get` breaks `torch.compile(fullgraph=True)`. Contexts never stay open
across a `yield`, so interleaved runs do not see each other's.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

AttentionFn = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class StepInfo:
    """Which step of a run a forward belongs to.

    Attributes:
        index, count: of the run, or of its block.
        timestep: of the schedule.
        block: index of the block in a block run or stream, else None.
    """

    index: int
    count: int
    timestep: float
    block: int | None = None


@dataclass(slots=True)
class ForwardContext:
    """Facts of the current forward.

    Attributes:
        attention: role of an attention layer ("self", "cross", ...) -> function that computes it. A role that is not
            listed takes the default of its device and dtype.
        step: the step that this forward is part of; None for a pass that is no step (a clean pass that fills a cache).
        stack: runs the transformer's blocks instead of the plain loop (`nn.stack.run_blocks`), for step caches.
        layer: number of the block that is running.
    """

    attention: Mapping[str, AttentionFn] = field(default_factory=dict[str, AttentionFn])
    step: StepInfo | None = None
    stack: Callable[..., Any] | None = None
    layer: int = 0


_STACK: list[ForwardContext] = []


def current_context() -> ForwardContext | None:
    """The innermost open context, or None outside the engine (for instance in training or a bare forward)."""
    return _STACK[-1] if _STACK else None


@contextmanager
def forward_context(context: ForwardContext) -> Generator[ForwardContext]:
    """Make `context` current inside the `with`."""
    _STACK.append(context)
    try:
        yield context
    finally:
        _STACK.pop()


@contextmanager
def with_stack(stack: Callable[..., Any]) -> Generator[ForwardContext]:
    """Inside the `with`, the current forward runs its blocks by `stack(x, calls)`; see `nn.stack.run_blocks`."""
    with forward_context(replace(current_context() or ForwardContext(), stack=stack)) as context:
        yield context
