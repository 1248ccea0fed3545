"""What happens beside the steps of a training: videos that are judged, and curves for those who watch."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType

from kinetoscope.core.files import append_line
from kinetoscope.media import contact_sheet
from kinetoscope.train.post import STUDENT
from kinetoscope.train.post_export import export_sampling
from kinetoscope.train.trainer import Trainer
from kinetoscope.train.validation import ValidationVideos
from kinetoscope.train.watch import Watcher, open_watchers


class Callbacks:
    """The callbacks of a recipe; use as a context manager. They draw no random number of the training.

    Of several processes each has them: all make the videos, since they may share weights, and the first one writes.

    Args:
        trainer: whose steps they follow.
        folder: of the run.

    Raises:
        ConfigError: a package that was asked for is not installed, or see `ValidationVideos`.
    """

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self._trainer, self._folder = trainer, folder
        self._section = trainer.recipe.callbacks
        self._watchers: list[Watcher] = []
        opened = trainer.roles[STUDENT].opened
        if sampling := export_sampling(trainer):
            opened = opened.sampled_as(sampling)
        self._videos = ValidationVideos(opened, self._section.validation) if self._section.validation.every else None

    def __enter__(self) -> Callbacks:
        if not self._trainer.team.leads:
            return self
        self._watchers = open_watchers(self._trainer.recipe, self._folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for watcher in self._watchers:
            watcher.close()

    def after_step(self, step: int, values: dict[str, float]) -> None:
        """Called with the number of each step and what it told."""
        for watcher in self._watchers:
            watcher.write(step + 1, values)
        every = self._section.validation.every
        if every and (step + 1) % every == 0:
            scores = self.validate(step + 1)
            for watcher in self._watchers:
                watcher.write(step + 1, {f"validation.{k}": v for k, v in scores.items()})

    def validate(self, step: int) -> dict[str, float]:
        """Sample with the averaged weights, write a contact sheet and a line of validation.jsonl.

        Returns:
            attribute -> share of videos that are right in it, where a world's judge reads them; nothing in processes
            that do not write.
        """
        videos, student = self._videos, self._trainer.roles[STUDENT]
        assert videos is not None
        student.model.transformer.eval()
        with self._trainer.learners[STUDENT].averaged():
            frames = videos.make(student.model.attention)
        student.model.on_train_start()
        if not self._trainer.team.leads:
            return {}
        scores = videos.scores(frames)
        labels = [shot.label for shot in videos.shots]
        contact_sheet(frames, self._folder / "validation" / f"step-{step:08d}.png", labels=labels, columns=9)
        append_line(self._folder / "validation.jsonl", json.dumps({"step": step, "videos": len(frames), **scores}))
        return scores
