"""A recipe of post-training from start to finish: roles, steps, a model directory or a LoRA with its card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from kinetoscope.core.errors import ConfigError
from kinetoscope.core.extensions import load_extensions
from kinetoscope.parallel import Groups
from kinetoscope.train.callbacks import Callbacks
from kinetoscope.train.kept import KeptCheckpoints
from kinetoscope.train.loop import Progress, run_job
from kinetoscope.train.output_folder import OutputFolder
from kinetoscope.train.post import STUDENT, Command, Made, PostRecipe, load_post_recipe
from kinetoscope.train.post_export import check_export, export
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
        ConfigError: the recipe does not read, its output folder holds a run of another recipe or of other inputs
            (`run_inputs`), another process trains in it, or there is no checkpoint to export.
        ModelLoadError: a model of a role cannot be opened.
        RunCancelled: stopped by a signal to any process; the same command continues.
        WorkerError: another process failed or is gone.
    """
    load_extensions()
    recipe = load_post_recipe(path, overrides)
    check_device(recipe.device)
    command = Command(str(path), tuple(overrides))
    with join_team(recipe.parallel, recipe.device, groups) as team:
        return _run(recipe, command, team, fresh, export_only, on_progress if team.leads else None)


def check_device(name: str) -> None:
    """Check that a recipe's device is one of torch's, and is there.

    Raises:
        ConfigError: it is not.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r}: torch knows no such device; use cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={name!r}: torch finds no CUDA device on this machine; set device=cpu")


def _run(
    recipe: PostRecipe,
    command: Command,
    team: Team,
    fresh: bool,
    export_only: bool,
    on_progress: Callable[[Progress], None] | None,
) -> Path:
    folder = OutputFolder(Path(recipe.output), recipe, CHANGEABLE | _open_end(recipe))
    torch.set_num_threads(recipe.threads)

    def counted(done: int, total: int) -> None:
        if on_progress:
            on_progress(Progress("latents", done, total, {}, 0.0))

    with ExitStack() as held:
        if not export_only:
            team.alone(lambda: held.enter_context(folder.held()))
        team.alone(lambda: folder.check(fresh=fresh))
        trainer = Trainer(recipe, folder.root, team=team, on_count=counted)
        check_export(trainer)
        store = KeptCheckpoints(folder.checkpoints, recipe.checkpoint.keep, team, trainer.state)
        if export_only:
            team.alone(lambda: folder.check_inputs(trainer.inputs(folder.inputs.files), resumes=True))
            if (found := store.load()) is None:
                raise ConfigError(f"{folder.checkpoints} holds no checkpoint yet; train first")
            trainer.load(found)
            step, seconds = found["step"], found["seconds"]
        else:
            step, seconds = recipe.loop.steps, _train(trainer, store, folder, on_progress)
        trainer.learners[STUDENT].finish()
        weights, made = trainer.student_weights(), Made(command, step, seconds)
        team.alone(lambda: export(trainer, weights, folder.model, folder.root, made))
    return folder.model


def _train(
    trainer: Trainer, store: KeptCheckpoints, folder: OutputFolder, on_progress: Callable[[Progress], None] | None
) -> float:
    """Do all steps that are left, and return the wall seconds over all runs. The folder is claimed when everything has
    been opened that the first step needs."""
    checkpoint = trainer.recipe.checkpoint
    trainer.prepare()

    def claim() -> None:
        inputs = trainer.inputs(folder.inputs.files, data=True)
        folder.check_inputs(inputs, resumes=store.holds_any())
        folder.claim(inputs)

    with Callbacks(trainer, folder.root) as callbacks:
        trainer.team.alone(claim)
        trainer.after_step = callbacks.after_step
        return run_job(
            trainer, store, folder.root / "log.jsonl" if trainer.team.leads else None,
            checkpoint_minutes=checkpoint.minutes, checkpoint_every=checkpoint.every, on_progress=on_progress,
            agree=trainer.team.most,
        )  # fmt: skip


def _open_end(recipe: PostRecipe) -> set[str]:
    """The number of steps may change where no learning rate depends on it."""
    trained = [recipe.optimizer_of(name) for name, model in recipe.models.items() if model.trainable]
    return {"loop.steps"} if all(section.final_fraction == 1 for section in trained) else set()
