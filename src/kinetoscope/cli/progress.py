"""Progress of a run: a bar with step time and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class RunProgress:
    """Shows the events of `VideoGenerator` and the progress of trainings. Use as a context manager."""

    def __init__(self, videos: int = 1) -> None:
        self._console = Console(stderr=True)
        self._live = self._console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[pace]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._live,
        )
        self._task: TaskID | None = None
        self._videos = videos

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
        elif event.kind == "step":
            self._advance(event.step.index + 1, event.step.count)

    def training(self, progress: Any) -> None:
        """One `train.Progress`."""
        loss = progress.losses.get("total")
        label = progress.task + (f" loss {loss:.4f}" if loss is not None else "")
        if self._live:
            if self._task is None or progress.step == 1:
                self._start(label)
            assert self._task is not None
            self._bar.update(self._task, description=label)
            self._advance(progress.step, progress.steps)
        elif progress.step % 100 == 0 or progress.step == progress.steps:
            print(f"{label} step {progress.step}/{progress.steps}", file=sys.stderr, flush=True)

    def items(self, label: str, done: int, total: int) -> None:
        """A plain count."""
        if self._task is None:
            self._start(label)
        self._advance(done, total)

    def _start(self, label: str) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(label, total=None, pace="")

    def _advance(self, done: int, total: int) -> None:
        assert self._task is not None
        task = next(t for t in self._bar.tasks if t.id == self._task)
        pace = f"{task.elapsed / done * 1e3:.0f} ms each" if task.elapsed and done else ""
        self._bar.update(self._task, completed=done, total=total, pace=pace)
