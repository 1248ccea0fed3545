"""What happens beside the steps of a training: videos that are judged, and curves for those who watch."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from kinetoscope.core.errors import ConfigError
from kinetoscope.evaluation import heldout_specs, prompt_following
from kinetoscope.media import contact_sheet
from kinetoscope.train.post import STUDENT
from kinetoscope.train.post_export import export_sampling
from kinetoscope.train.trainer import Trainer
from kinetoscope.train.watch import Watcher, open_watchers
from kinetoscope.worlds import get_world

VIDEOS_AT_ONCE = 4


class Callbacks:
    """The callbacks of a recipe; use as a context manager. They draw no random number of the training.

    Of several processes each has them: all make the videos, since they may share weights, and the first one writes.

    Args:
        trainer: whose steps they follow.
        folder: of the run.

    Raises:
        ConfigError: a package that was asked for is not installed, or a model without a world is to be judged.
    """

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self._trainer, self._folder = trainer, folder
        self._section = trainer.recipe.callbacks
        self._watchers: list[Watcher] = []
        self._opened = trainer.roles[STUDENT].opened
        name = self._opened.model.sidecar.get("world")
        if self._section.validation.every and name is None:
            raise ConfigError(
                f"{self._opened.model.name} names no world, so there is no judge for its videos; set "
                "callbacks.validation.every=0"
            )
        self._world = get_world(name) if self._section.validation.every else None
        if sampling := export_sampling(trainer):
            self._opened = self._opened.sampled_as(sampling)

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
        """Sample with the averaged weights, judge, and write a contact sheet and a line of validation.jsonl.

        Returns:
            attribute -> share of videos that show it as the caption says; nothing in processes that do not write.
        """
        section = self._section.validation
        assert self._world is not None
        specs = heldout_specs(self._world, section.videos)
        student = self._trainer.roles[STUDENT]
        frames: list[Any] = []
        student.model.transformer.eval()
        with self._trainer.learners[STUDENT].averaged():
            for start in range(0, len(specs), VIDEOS_AT_ONCE):
                part = specs[start : start + VIDEOS_AT_ONCE]
                seeds = list(range(start, start + len(part)))
                batch = self._opened.sample([s.caption() for s in part], seeds, **section.params)
                assert batch.frames is not None
                frames += batch.frames
        student.model.on_train_start()
        if not self._trainer.team.leads:
            return {}
        report = prompt_following(self._world, zip(specs, frames, strict=True))
        scores = {name: score.value for name, score in report.items()}
        folder = self._folder / "validation"
        folder.mkdir(exist_ok=True)
        contact_sheet(frames, folder / f"step-{step:08d}.png", labels=[s.caption() for s in specs], columns=9)
        with (self._folder / "validation.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "videos": len(specs), **scores}) + "\n")
        return scores
