"""A step of each training method on the pretend device; see `rows`."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.pretend_device import DEVICE, Counts, pretend_device

from kinetoscope.train.post import load_post_recipe
from kinetoscope.train.post_run import run_post_recipe
from kinetoscope.train.trainer import Trainer
from tiny import make_tiny_wan
from train.post_runs import write_recipe

METHODS: dict[str, dict[str, Any]] = {
    "finetune": {},
    "lora": {"lora": True},
    "consistency": {},
    "dmd2": {},
}


def sections(name: str, model: Path) -> dict[str, Any]:
    """The sections of a recipe of a method that differ from those of a fine-tuning."""
    student: dict[str, Any] = {"init_from": str(model), "trainable": True}
    frozen = {"init_from": str(model), "trainable": False}
    if name == "lora":
        return {"models": {"student": student | {"lora": {"rank": 2}}}}
    if name == "consistency":
        return {"models": {"student": student, "teacher": frozen}, "method": {"name": "consistency"}}
    if name == "dmd2":
        roles = {"student": student, "critic": dict(student), "teacher": frozen}
        return {"models": roles, "method": {"name": "dmd2", "steps": [1000, 500], "student_every": 1}}
    return {}


def measure_training(name: str, folder: Path, counts: Counts) -> dict[str, Any]:
    """What the updates of one method do, and how far its losses are from those of the CPU."""
    model = folder / "wan"
    if not model.exists():
        make_tiny_wan(model)
    updates: list[Counts] = []
    losses: dict[str, list[float]] = {}
    original = Trainer._update

    def update(self: Trainer, *args: Any) -> dict[str, float]:
        before = counts.copy()
        values = original(self, *args)
        updates.append(counts.since(before))
        losses.setdefault(self.recipe.device, []).append(values["total"])
        return values

    whole = counts.copy()
    Trainer._update = update
    try:
        for device in (DEVICE, "cpu"):
            place = folder / f"{name}-{device.partition(':')[0]}"
            run_post_recipe(load_post_recipe(write_recipe(place, model, device=device, **sections(name, model))))
    finally:
        Trainer._update = original
    ours, theirs = losses[DEVICE], losses["cpu"]
    return {
        "mixes": counts.since(whole).mixes,
        "syncs": max(c.syncs.total() for c in updates),
        "copies": max(c.copies.total() for c in updates),
        "places": {k: n for c in updates[-1:] for k, n in [*c.syncs.items(), *c.copies.items()]},
        "difference": max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)),
    }


def measure_trainings(names: Sequence[str], folder: Path) -> dict[str, Any]:
    """What each method does, or its error."""
    found: dict[str, Any] = {}
    with pretend_device() as counts:
        for name in names:
            try:
                found[name] = measure_training(name, folder, counts)
            except Exception:
                found[name] = {"error": traceback.format_exc()}
    return found
