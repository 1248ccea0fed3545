"""One step of each training method on the pretend device, beside the same step on the CPU.

`measure_trainings` is the program of a process of its own, which it ends: a backward pass leaves a thread of the device
behind that aborts the interpreter's own end.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.pretend_device import DEVICE, Counts, pretend_device

from kinetoscope.train.post import load_post_recipe
from kinetoscope.train.trainer import Trainer
from tiny import make_tiny_wan
from train.post_runs import write_recipe

TRAINED: dict[str, Any] = {"trainable": True}
CAUSAL = TRAINED | {"causal": {"num_frames_per_block": 1}}
ROLES: dict[str, dict[str, Any]] = {"student": TRAINED, "teacher": {}, "critic": TRAINED}
MATCHED: dict[str, Any] = {"steps": [1000, 500], "student_every": 1, "guidance": 2.0}
PAIRS: dict[str, Any] = {
    "source": "ode_pairs",
    "prompts": "shapes",
    "count": 2,
    "batch": 2,
    "steps": [1000, 500],
    "sampling": {"height": 16, "width": 32, "num_frames": 5, "num_inference_steps": 4, "scheduler": "euler"},
}
METHODS: dict[str, dict[str, Any]] = {
    "finetune": {},
    "lora": {"models": {"student": TRAINED | {"lora": {"rank": 2}}}},
    "checkpointing": {"models": {"student": TRAINED | {"checkpointing": True}}},
    "sparse_finetune": {"method": {"name": "sparse_finetune", "start": 0.5, "sparsity": 0.5, "tile": [1, 2, 2]}},
    "consistency": {"models": {"student": TRAINED, "teacher": {}}, "method": {"name": "consistency"}},
    "dmd2": {"models": ROLES, "method": {"name": "dmd2", **MATCHED}},
    "self_forcing": {"models": {**ROLES, "student": CAUSAL}, "method": {"name": "self_forcing", **MATCHED}},
    "diffusion_forcing": {"models": {"student": CAUSAL}, "method": {"name": "diffusion_forcing"}},
    "teacher_forcing": {"models": {"student": CAUSAL}, "method": {"name": "teacher_forcing"}},
    "ode_distill": {"models": {"student": CAUSAL}, "method": {"name": "ode_distill"}, "data": PAIRS},
}
"""What the recipe of a row has in place of what `write_recipe` writes for a fine-tuning."""


def open_trainer(name: str, folder: Path, device: str) -> Trainer:
    """The trainer of a row, with its data, in a folder for the device."""
    model, place = folder / "wan", folder / f"{name}-{device.partition(':')[0]}"
    if not model.exists():
        make_tiny_wan(model)
    sections = {"loop": {}, **METHODS[name]}
    sections["loop"] = {"steps": 1, **sections["loop"]}
    roles = sections.get("models", {"student": TRAINED})
    sections["models"] = {role: {"init_from": str(model), **section} for role, section in roles.items()}
    if "data" in sections:
        sections["data"] = {"folder": str(place / "pairs"), "teacher": str(model), **sections["data"]}
    trainer = Trainer(load_post_recipe(write_recipe(place, model, device=device, **sections)), place)
    trainer.prepare()
    return trainer


def measure_training(name: str, folder: Path, counts: Counts) -> dict[str, Any]:
    """What a step of a row mixes and reads, and how far its losses are from those of the CPU."""
    whole = counts.copy()
    trainer = open_trainer(name, folder, DEVICE)
    before = counts.copy()
    ours = trainer.step(0)
    step = counts.since(before)
    theirs = open_trainer(name, folder, "cpu").step(0)
    assert ours.keys() == theirs.keys()
    parameters = [p for role in trainer.roles.values() for p in role.model.transformer.parameters()]
    return {
        "mixes": counts.since(whole).mixes,
        "syncs": step.syncs,
        "values": ours,
        "devices": sorted({p.device.type for p in parameters}),
        "difference": max(abs(ours[k] - v) / max(abs(v), 1e-3) for k, v in theirs.items()),
    }


def measure_trainings(names: Sequence[str], folder: Path, out: Path) -> None:
    """Write what each row does as JSON, or its error, and end the process."""
    import torch

    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with pretend_device() as counts:
        for name in names:
            try:
                found[name] = measure_training(name, folder, counts)
            except Exception:
                found[name] = {"error": traceback.format_exc()}
    out.write_text(json.dumps(found, indent=1))
    os._exit(0)
