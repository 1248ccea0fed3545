"""Progress to a caller, and cancel from one."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event as Flag
from typing import ClassVar

from kinetoscope.core.errors import RunCancelled
from kinetoscope.engine.hooks.base import Hook
from kinetoscope.engine.protocols import Step, StrategyState


class ProgressHook(Hook):
    """Reports each finished step and stops a run, before its next step, once `cancel` is set.

    For code that holds the run's iterator neither is needed: it sees the events, and closing the iterator cancels. This
    hook is for callers elsewhere, such as another thread.

    Args:
        on_step: called after each step with (steps done, steps of the run or block).
        cancel: set it from any thread; the run then raises `RunCancelled`.
    """

    name: ClassVar[str] = "progress"
    order: ClassVar[int] = 0

    def __init__(self, on_step: Callable[[int, int], None] | None = None, cancel: Flag | None = None) -> None:
        self.on_step = on_step
        self.cancel = cancel or Flag()

    def on_step_start(self, state: StrategyState, step: Step) -> None:
        if self.cancel.is_set():
            raise RunCancelled(f"the run was cancelled before step {step.index + 1} of {step.count}")

    def on_step_end(self, state: StrategyState, step: Step) -> None:
        if self.on_step:
            self.on_step(step.index + 1, step.count)
