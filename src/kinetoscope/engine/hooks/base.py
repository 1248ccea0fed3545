"""Hooks: observers watch a run, interceptors stand around the network's forward. Neither edits the sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor

from kinetoscope.core.errors import CompositionError
from kinetoscope.core.protocols import check_protocol, check_spelling
from kinetoscope.engine.protocols import BlockContext, ModelInputs, Step, StrategyState

Forward = Callable[[StrategyState, ModelInputs], Tensor]


class Hook:
    """An observer. Override what you need; the defaults do nothing.

    What a hook keeps for a run belongs in `state.scratch[self]`, since one hook may watch several open runs.

    Attributes:
        name: how users and messages call it.
        order: hooks with a smaller order start earlier and end later (the outer layers of an onion).
        conflicts: names of hooks that cannot be on the same engine.
        from_options: made by an option of the generator, which makes it again when a video is replayed.
    """

    name: ClassVar[str] = ""
    order: ClassVar[int] = 100
    conflicts: ClassVar[frozenset[str]] = frozenset()
    from_options: ClassVar[bool] = False

    def on_run_start(self, state: StrategyState) -> None:
        """Before the first step or block."""

    def on_run_end(self, state: StrategyState, error: BaseException | None) -> None:
        """Once for each started run: after success (`error` None), an error, or a close (`GeneratorExit`)."""

    def on_block_start(self, state: StrategyState, context: BlockContext) -> None:
        """After the strategy set the block up."""

    def on_block_end(self, state: StrategyState, context: BlockContext) -> None:
        """After the strategy took the block into its memory; `context.result` is set."""

    def on_step_start(self, state: StrategyState, step: Step) -> None:
        """Before the rows of a step are made."""

    def on_step_end(self, state: StrategyState, step: Step) -> None:
        """After the scheduler step; `step` holds the predictions, `state.latents` the new sample."""


class Interceptor(Hook):
    """A hook that stands around each forward: it may call through, change how, or answer from a cache."""

    def around_forward(self, call: Forward, state: StrategyState, inputs: ModelInputs) -> Tensor:
        """The output for `inputs` [r, ...]; `call(state, inputs)` asks the next layer."""
        return call(state, inputs)

    def bind(self, call: Forward) -> Forward:
        """`call` with this interceptor around it."""
        return lambda state, inputs: self.around_forward(call, state, inputs)


def check_hook(hook: Hook) -> None:
    """Refuse a hook that would not be called as its author means.

    Raises:
        CompositionError: it lacks a method of `Hook` (or `Interceptor`) or has one of another signature; a name looks
            like a misspelt method; it has `around_forward` and is no `Interceptor`.
    """
    kind = type(hook)
    role = f"hook {getattr(hook, 'name', '') or kind.__name__!r}"
    intercepts = hasattr(hook, "around_forward")
    check_protocol(hook, Interceptor if intercepts else Hook, role)
    if intercepts and not isinstance(hook, Interceptor):
        raise CompositionError(f"{role}: {kind.__name__} has around_forward and is no Interceptor; derive it from one")
    for base in kind.__mro__:
        if base not in (Hook, Interceptor, object):
            check_spelling(base, Interceptor, "on_", role)


def arrange(hooks: Sequence[Hook]) -> tuple[Hook, ...]:
    """`hooks` in firing order.

    Raises:
        CompositionError: one is given twice, two conflict (the message names both), or one lacks a method of `Hook`.
    """
    for hook in hooks:
        check_hook(hook)
    ordered = tuple(sorted(hooks, key=lambda h: h.order))
    for i, first in enumerate(ordered):
        for second in ordered[i + 1 :]:
            if first.name == second.name:
                raise CompositionError(f"hook {first.name!r} is given twice")
            if second.name in first.conflicts or first.name in second.conflicts:
                raise CompositionError(f"hooks {first.name!r} and {second.name!r} cannot be used together")
    return ordered
