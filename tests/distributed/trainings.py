"""Small trainings that one process and several run alike, and what is told of them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from kinetoscope.core.errors import InputError, KinetoscopeError, RunCancelled
from kinetoscope.parallel import Groups
from kinetoscope.parallel.groups import leave
from kinetoscope.train.data.worlds import WorldSource
from kinetoscope.train.post import load_post_recipe
from kinetoscope.train.post_run import run_post_recipe
from kinetoscope.train.team import join_team
from kinetoscope.train.trainer import Trainer
from train.post_runs import write_recipe

ROLES: dict[str, dict[str, Any]] = {
    "finetune": {"student": {"trainable": True}},
    "recomputed": {"student": {"trainable": True, "checkpointing": True}},
    "compiled": {"student": {"trainable": True, "compile": True}},
    "lora": {"student": {"trainable": True, "lora": {"rank": 4}}},
    "dmd2": {
        "student": {"trainable": True, "shift": 3.0},
        "teacher": {},
        "critic": {"trainable": True, "optimizer": {"learning_rate": 2e-3, "warmup": 1}},
    },
}
ROLES["teacher_forcing"] = {"student": {"trainable": True, "causal": {"num_frames_per_block": 1}}}
ROLES["self_forcing"] = {**ROLES["dmd2"], **ROLES["teacher_forcing"]}
METHODS: dict[str, dict[str, Any]] = {
    "dmd2": {"name": "dmd2", "student_every": 2, "guidance": 2.0},
    "teacher_forcing": {"name": "teacher_forcing", "resample": 0.5},
    "self_forcing": {"name": "self_forcing", "student_every": 2, "guidance": 2.0},
}


Losses = list[dict[str, float]]
"""What each step told."""


def make_recipe(folder: Path, model: Path, kind: str = "finetune", steps: int = 5, **sections: Any) -> Path:
    """A recipe at `folder` of one of `ROLES`: two micro-batches of two clips an update."""
    models = {name: {"init_from": str(model), **section} for name, section in ROLES[kind].items()}
    optimizer = {
        "learning_rate": 1e-3,
        "warmup": 2,
        "weight_decay": 0.1,
        "ema": 0.8,
        "clip": 0.5,
        "final_fraction": 1.0,
    }
    method = METHODS.get(kind, {"name": "finetune", "caption_dropout": 0.4})
    chosen = {"models": models, "method": method, "optimizer": optimizer, "loop": {"steps": steps, "accumulate": 2}}
    return write_recipe(folder, model, **{**chosen, **sections})


def told(groups: Groups | None, recipe: Path, overrides: Sequence[str] = ()) -> Losses:
    """A training of so many steps as the recipe has."""
    loaded = load_post_recipe(recipe, overrides)
    with join_team(loaded.parallel, "cpu", groups) as team:
        trainer = Trainer(loaded, recipe.parent, team=team)
        trainer.prepare()
        found = [trainer.step(step) for step in range(loaded.loop.steps)]
    cut = any(isinstance(p, DTensor) for role in trainer.roles.values() for p in role.model.transformer.parameters())
    assert cut is loaded.parallel.fsdp
    return found


def all_told(groups: Groups | None, recipes: Sequence[Path], overrides: Sequence[str]) -> list[Losses]:
    """`told` of each recipe."""
    return [told(groups, recipe, overrides) for recipe in recipes]


def layout_of(groups: Groups | None) -> str:
    """The override that names the layout of the processes which the test has started: their rows are replicas."""
    if groups is None:
        return "parallel={}"
    config = asdict(groups.config)
    replicas = config.pop("cfg")
    return f"parallel={json.dumps({**config, 'replicas': replicas})}"


def run(groups: Groups | None, recipe: Path, overrides: Sequence[str] = (), stop: tuple[int, int] | None = None) -> Any:
    """Run a recipe as a command does.

    Args:
        stop: (rank, step) that gets a SIGTERM.

    Returns:
        steps of which this process heard, and what the error that ended it says.
    """
    heard: list[int] = []
    rank = 0 if groups is None else groups.rank
    whole = Trainer.step

    def step(self: Trainer, number: int) -> dict[str, float]:
        if stop == (rank, number + 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, number)

    Trainer.step = step
    try:
        run_post_recipe(
            recipe, [layout_of(groups), *overrides], on_progress=lambda told: heard.append(told.step), groups=groups
        )
    except RunCancelled as error:
        return heard, str(error)
    except KinetoscopeError as error:
        return heard, f"{type(error).__name__}: {error}"
    finally:
        Trainer.step = whole
    return heard, ""


def runs(groups: Groups, plan: Sequence[tuple[Any, ...]]) -> list[Any]:
    """`run` of each, one after another."""
    return [run(groups, *arguments) for arguments in plan]


def broken(groups: Groups, recipe: Path) -> str:
    """A run whose second process cannot read its data in the third step; what each says."""
    whole = WorldSource.batch

    def batch(self: WorldSource, step: int, generator: torch.Generator) -> Any:
        if groups.rank == 1 and step > 4:
            raise InputError("a file is gone")
        return whole(self, step, generator)

    WorldSource.batch = batch
    said = run(groups, recipe)[1]
    leave()  # as a command does at its end
    return said
