"""Small recipes of post-training, and a method with two roles whose phases depend on the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from torch import Tensor

from kinetoscope.diffusion.noise import randn
from kinetoscope.train.methods import MethodSettings, register_method
from kinetoscope.train.roles import ModelBase, TrainBatch


class ToySettings(MethodSettings):
    """Settings of `Toy`."""

    pull: float = 0.5


class Toy:
    """A critic in every step and a student in every second, each pulled to what the teacher says of noise."""

    settings_class: ClassVar[type[MethodSettings]] = ToySettings
    needs: ClassVar[tuple[str, ...]] = ("student", "critic", "teacher")

    def __init__(self, roles: Mapping[str, ModelBase], settings: ToySettings) -> None:
        self.roles, self.settings = roles, settings

    def updates(self, step: int) -> Sequence[str]:
        """The student's turn is every second step."""
        return ("critic", "student") if step % 2 else ("critic",)

    def losses(self, role: str, batch: TrainBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """How far the role is from the teacher."""
        s = torch.rand(batch.rows, generator=generator)
        x = self.roles[role].add_noise(batch.latents, randn(batch.latents.shape, generator), s)
        with torch.no_grad():
            wanted = self.settings.pull * self.roles["teacher"].predict(x, s, batch)
        return {"total": (self.roles[role].predict(x, s, batch) - wanted).square().mean(), "level": s.mean()}


register_method("toy", "train.post_runs:Toy")


def write_recipe(folder: Path, model: Path, **sections: Any) -> Path:
    """A recipe of a fine-tuning of three steps at `folder`/recipe.yaml; `sections` replace its own."""
    recipe: dict[str, Any] = {
        "name": "tuned",
        "output": str(folder / "run"),
        "models": {"student": {"init_from": str(model), "trainable": True}},
        "method": {"name": "finetune", "caption_dropout": 0.4},
        "data": {
            "source": "world",
            "world": {"name": "shapes", "height": 16, "width": 32, "num_frames": 5},
            "batch": 2,
            "clips": 4,
            "cache": str(folder.parent / "latents"),
        },
        "optimizer": {"learning_rate": 0.01, "warmup": 2, "weight_decay": 0.1, "ema": 0.8, "clip": 0.5},
        "loop": {"steps": 3, "accumulate": 2},
        "export": {"dtype": "float32"},
        "callbacks": {"tensorboard": False},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe, **sections}))
    return path


def toy_sections(model: Path, steps: int) -> dict[str, Any]:
    """Sections of a recipe of `Toy` that keeps a checkpoint of every step."""
    models = {name: {"init_from": str(model), "trainable": name != "teacher"} for name in Toy.needs}
    return {
        "models": models,
        "method": {"name": "toy"},
        "loop": {"steps": steps},
        "checkpoint": {"every": 1, "keep": 2},
    }
