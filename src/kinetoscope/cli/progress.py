"""Progress of a run: a bar with step time and time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from kinetoscope.core.config import launch

PLAIN_SECONDS = 10.0
"""Time between two lines where there is no terminal."""


def leads() -> bool:
    """Whether this process tells and writes: it is alone, or the first of those that torchrun started."""
    started = launch()
    return started is None or started.rank == 0


class RunProgress:
    """Shows the events of `VideoGenerator`, the progress of trainings, or a count. Use as a context manager.

    Args:
        quiet: whether to show nothing.

    Attributes:
        seconds: stage -> seconds over all runs so far.
    """

    def __init__(self, quiet: bool = False) -> None:
        console = Console(stderr=True)
        self.seconds: dict[str, float] = {}
        self._tells = leads() and not quiet
        self._live = console.is_terminal and self._tells
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[pace]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not self._live,
        )
        self._task: TaskID | None = None
        self._label = ""
        self._begun = self._told = 0.0
        self._first = 0
        self._losses: dict[str, float] = {}

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def event(self, event: Any) -> None:
        """One event of a generation."""
        if event.kind == "stage_start":
            self._start(event.stage.replace("_", " "))
        elif event.kind == "stage_end":
            self.seconds[event.stage] = self.seconds.get(event.stage, 0.0) + event.seconds
        elif event.kind == "step":
            self._advance(event.step.index + 1, event.step.count)

    def training(self, progress: Any) -> None:
        """One `train.Progress`."""
        if not self._label.startswith(progress.task):
            self._start(progress.task, done=progress.step - 1)
            self._losses = {}
        ends = "total"  # of one loss, or of each role's
        self._losses |= {k.removesuffix(ends): v for k, v in progress.losses.items() if k.endswith(ends)}
        self._label = progress.task + "".join(f" {k.replace('.', ' ')}loss {v:.4f}" for k, v in self._losses.items())
        self._advance(progress.step, progress.steps)

    def items(self, label: str, done: int, total: int) -> None:
        """A plain count."""
        if self._label != label:
            self._start(label)
        self._advance(done, total)

    def resumed(self, label: str) -> Callable[[int, int], None]:
        """Takes (done, total) of a count whose first call says how much an earlier run had done."""

        def tell(done: int, total: int) -> None:
            if self._label != label:
                self._start(label, done)
            self._advance(done, total)

        return tell

    def _start(self, label: str, done: int = 0) -> None:
        """A new bar; `done` were finished before the clock started."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(label, total=None, pace="")
        self._label, self._first = label, done
        self._begun = self._told = time.monotonic()

    def _advance(self, done: int, total: int) -> None:
        now = time.monotonic()
        each = (now - self._begun) / max(done - self._first, 1)
        pace = f"{each * 1e3:.0f} ms each"
        if self._live and self._task is not None:
            self._bar.update(self._task, description=self._label, completed=done, total=total, pace=pace)
        elif self._tells and now - self._told >= PLAIN_SECONDS:
            self._told = now
            left = f"{each * (total - done):.0f} s left"
            print(f"{self._label}: {done} of {total}, {pace}, {left}", file=sys.stderr, flush=True)
