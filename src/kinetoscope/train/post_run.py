"""A recipe of post-training from start to finish: roles, steps, a model directory or a LoRA with its card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from kinetoscope.train.callbacks import Callbacks
from kinetoscope.train.loop import Progress, run_job
from kinetoscope.train.post import STUDENT, Command, load_post_recipe
from kinetoscope.train.post_export import export
from kinetoscope.train.run import Folders, claim
from kinetoscope.train.trainer import KeptCheckpoints, Trainer

CHANGEABLE = {"output", "threads", "device", "checkpoint", "callbacks"}
"""What may differ between two runs of one recipe: it says nothing of what is trained."""


def run_post_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    fresh: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Make the model of a recipe; continues where an earlier run of the same recipe stopped, bit for bit.

    Args:
        path: a YAML file with a `method` section.
        overrides: "section.key=value" each.
        fresh: refuse to continue an earlier run.
        on_progress: called after every step.

    Returns:
        the finished model directory, in diffusers layout; of a LoRA the folder of its files.

    Raises:
        ConfigError: the recipe does not read, or its output folder holds a run of another recipe.
        ModelLoadError: a model of a role cannot be opened.
        RunCancelled: stopped by a signal; the same command continues.
    """
    recipe = load_post_recipe(path, overrides)
    folders = Folders(Path(recipe.output))
    claim(folders.root, recipe, fresh, CHANGEABLE)
    torch.set_num_threads(recipe.threads)

    def counted(done: int, total: int) -> None:
        if on_progress:
            on_progress(Progress("latents", done, total, {}, 0.0))

    trainer = Trainer(recipe, folders.root, on_count=counted)
    with Callbacks(trainer, folders.root) as callbacks:
        trainer.after_step = callbacks.after_step
        seconds = run_job(
            trainer, KeptCheckpoints(folders.checkpoints, recipe.checkpoint.keep), folders.root / "log.jsonl",
            checkpoint_minutes=recipe.checkpoint.minutes, checkpoint_every=recipe.checkpoint.every,
            on_progress=on_progress,
        )  # fmt: skip
    trainer.learners[STUDENT].finish()
    command = Command(str(path), tuple(overrides))
    return export(trainer, folders.model, folders.root, command, seconds)
