"""What a forward pass may know besides its arguments.

The engine pushes a `ForwardContext` around each forward; leaves such as attention read the top of the stack. It is a
plain module-level list because `ContextVar.get` breaks `torch.compile(fullgraph=True)`. Contexts never stay open
across a `yield`, so interleaved runs do not see each other's.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

AttentionFn = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """Read-only facts of the current forward.

    Attributes:
        attention: role of an attention layer ("self", "cross", ...) -> function that computes it. A role that is not
            listed takes the default of its device and dtype.
    """

    attention: Mapping[str, AttentionFn] = field(default_factory=dict[str, AttentionFn])


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
