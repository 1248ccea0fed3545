"""What a forward pass may know besides its arguments.

The engine pushes a `ForwardContext` around each forward; leaves such as attention read the top of the stack. Every
thread has a stack of its own, in a `threading.local`: `torch.compile(fullgraph=True)` traces it, and one graph serves
all threads, while `ContextVar.get` breaks the graph. Contexts never stay open across a `yield`, so interleaved runs do
not see each other's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

AttentionFn = Callable[..., Tensor]

Span = tuple[int, int]
"""Consecutive tokens [start, stop)."""

Rows = Sequence[tuple[Span, tuple[Span, ...]]]
"""Consecutive queries and the keys that they attend to, in order; together all queries. Token numbers of the whole
sequence, also where this process has a part of it."""


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


@dataclass(frozen=True, slots=True)
class SharedAttention:
    """An attention whose tokens are shared out among processes; see `attention.attention` for the arguments.

    Attributes:
        q: [R, n + L, H, D] queries of the tokens that this process has, and of L that every process has (text).
        k, v: [R, lead + n + L, H, D].
        lead: keys before those of the tokens, which every process has.
        key_bias: [R, lead + N + L] of the whole sequence.
        rows: of the whole sequence.
        gate: [R, n, H, D], for sparse kinds.
        memory: (k, v) of this step -> those that its queries see, as a K/V cache gives them.
        sparse: what the kind is called where it needs all tokens in one place; "" for plain softmax attention.
        local: (q, k, v, key_bias, rows, gate) -> the attention of tensors that are all here, by the chosen backend.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lead: int
    key_bias: Tensor | None
    rows: Rows | None
    gate: Tensor | None
    memory: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None
    sparse: str
    local: Callable[[Tensor, Tensor, Tensor, Tensor | None, Rows | None, Tensor | None], Tensor]


class TokenShare(Protocol):
    """The part of a video's `tokens` that this process has: `own` from `start` on, those beyond the end being padding.

    The shares of all processes are of one size and follow each other in the order of their ranks.
    """

    @property
    def tokens(self) -> int: ...

    @property
    def own(self) -> int: ...

    @property
    def start(self) -> int: ...

    def take(self, x: Tensor, axis: int) -> Tensor:
        """The own part of the first `tokens` entries along `axis`, and all of what follows them."""
        ...

    def gather(self, x: Tensor, axis: int) -> Tensor:
        """The parts of all processes, without padding."""
        ...

    def attend(self, call: SharedAttention) -> Tensor:
        """[R, n + L, H, D] attention over the tokens of all processes."""
        ...


class TokenShard(Protocol):
    """Who shares the tokens of a row (`parallel.sequence`)."""

    def share(self, tokens: int) -> TokenShare:
        """The part of a video of so many tokens that this process computes."""
        ...


@dataclass(slots=True)
class ForwardContext:
    """Facts of the current forward.

    Attributes:
        attention: role of an attention layer ("self", "cross", ...) -> function that computes it. A role that is not
            listed takes the default of its device and dtype.
        step: the step that this forward is part of; None for a pass that is no step (a clean pass that fills a cache).
        stack: runs the transformer's blocks instead of the plain loop (`nn.stack.run_blocks`), for step caches.
        layer: number of the block that is running.
        shard: shares out the tokens that blocks are run on (`nn.stack.run_calls`); None: all are computed here.
        share: while blocks run on a part of the tokens, which part.
        blocks_ran: the forward has run its blocks through `nn.stack.run_blocks`.
    """

    attention: Mapping[str, AttentionFn] = field(default_factory=dict[str, AttentionFn])
    step: StepInfo | None = None
    stack: Callable[..., Any] | None = None
    layer: int = 0
    shard: TokenShard | None = None
    share: TokenShare | None = None
    blocks_ran: bool = False


class _ThreadContexts(threading.local):
    """The open contexts of one thread, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[ForwardContext] = []


_CONTEXTS = _ThreadContexts()


def current_context() -> ForwardContext | None:
    """Return this thread's innermost open context, or None outside the engine (in training, or a bare forward)."""
    stack = _CONTEXTS.stack
    return stack[-1] if stack else None


def current_share() -> TokenShare | None:
    """Which part of the tokens this process computes; None: all of them."""
    context = current_context()
    return None if context is None else context.share


@contextmanager
def forward_context(context: ForwardContext) -> Generator[ForwardContext]:
    """Make `context` this thread's current one inside the `with`."""
    stack = _CONTEXTS.stack
    stack.append(context)
    try:
        yield context
    finally:
        stack.pop()


@contextmanager
def with_stack(stack: Callable[..., Any]) -> Generator[ForwardContext]:
    """Inside the `with`, the current forward runs its blocks by `stack(x, calls)`; see `nn.stack.run_blocks`."""
    with forward_context(replace(current_context() or ForwardContext(), stack=stack)) as context:
        yield context
