"""A recipe of post-training from start to finish: roles, steps, a model directory or a LoRA with its card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from kinetoscope.core.errors import ConfigError
from kinetoscope.parallel import Groups
from kinetoscope.train.callbacks import Callbacks
from kinetoscope.train.kept import KeptCheckpoints
from kinetoscope.train.loop import Progress, run_job
from kinetoscope.train.post import STUDENT, Command, Made, PostRecipe, load_post_recipe
from kinetoscope.train.post_export import export
from kinetoscope.train.run import Folders, claim
from kinetoscope.train.team import Team, join_team
from kinetoscope.train.trainer import Trainer

CHANGEABLE = {"output", "threads", "device", "checkpoint", "callbacks", "export", "parallel", "loop.log_every"}
"""What may differ between two runs of one recipe: it says nothing of what is trained."""


def run_post_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    fresh: bool = False,
    export_only: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    groups: Groups | None = None,
) -> Path:
    """Make the model of a recipe; continues where an earlier run of the same recipe stopped, bit for bit.

    Where the recipe has a layout of several devices, each of the processes that torchrun started calls it.

    Args:
        path: a YAML file with a `method` section.
        overrides: "section.key=value" each.
        fresh: refuse to continue an earlier run.
        export_only: write the model of the newest checkpoint and train nothing; another process may be training.
        on_progress: called after every step, in the first process.
        groups: see `join_team`.

    Returns:
        the finished model directory, in diffusers layout; of a LoRA the folder of its files.

    Raises:
        ConfigError: the recipe does not read, its output folder holds a run of another recipe, or there is no
            checkpoint to export.
        ModelLoadError: a model of a role cannot be opened.
        RunCancelled: stopped by a signal to any process; the same command continues.
        WorkerError: another process failed or is gone.
    """
    recipe = load_post_recipe(path, overrides)
    command = Command(str(path), tuple(overrides))
    with join_team(recipe.parallel, recipe.device, groups) as team:
        return _run(recipe, command, team, fresh, export_only, on_progress if team.leads else None)


def _run(
    recipe: PostRecipe,
    command: Command,
    team: Team,
    fresh: bool,
    export_only: bool,
    on_progress: Callable[[Progress], None] | None,
) -> Path:
    folders = Folders(Path(recipe.output))
    team.alone(lambda: claim(folders.root, recipe, fresh, CHANGEABLE | _open_end(recipe)))
    torch.set_num_threads(recipe.threads)

    def counted(done: int, total: int) -> None:
        if on_progress:
            on_progress(Progress("latents", done, total, {}, 0.0))

    trainer = Trainer(recipe, folders.root, team=team, on_count=counted)
    store = KeptCheckpoints(folders.checkpoints, recipe.checkpoint.keep, team, trainer.state)
    if export_only:
        if (found := store.load()) is None:
            raise ConfigError(f"{folders.checkpoints} holds no checkpoint yet; train first")
        trainer.load(found)
        step, seconds = found["step"], found["seconds"]
    else:
        step, seconds = recipe.loop.steps, _train(trainer, store, folders, on_progress)
    trainer.learners[STUDENT].finish()
    weights, made = trainer.student_weights(), Made(command, step, seconds)
    team.alone(lambda: export(trainer, weights, folders.model, folders.root, made))
    return folders.model


def _train(
    trainer: Trainer, store: KeptCheckpoints, folders: Folders, on_progress: Callable[[Progress], None] | None
) -> float:
    """All steps that are left; wall seconds over all runs."""
    checkpoint = trainer.recipe.checkpoint
    trainer.prepare()
    with Callbacks(trainer, folders.root) as callbacks:
        trainer.after_step = callbacks.after_step
        return run_job(
            trainer, store, folders.root / "log.jsonl" if trainer.team.leads else None,
            checkpoint_minutes=checkpoint.minutes, checkpoint_every=checkpoint.every, on_progress=on_progress,
            agree=trainer.team.most,
        )  # fmt: skip


def _open_end(recipe: PostRecipe) -> set[str]:
    """The number of steps may change where no learning rate depends on it."""
    trained = [recipe.optimizer_of(name) for name, model in recipe.models.items() if model.trainable]
    return {"loop.steps"} if all(section.final_fraction == 1 for section in trained) else set()
