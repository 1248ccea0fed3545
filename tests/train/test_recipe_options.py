"""Options of post-training recipes: what has no effect is refused by name, what breaks late is told at the start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from kinetoscope.core.errors import ConfigError
from kinetoscope.train.checkpoint import load_checkpoint
from kinetoscope.train.methods import MethodSettings, register_method
from kinetoscope.train.post import STUDENT, load_post_recipe
from kinetoscope.train.post_run import run_post_recipe
from kinetoscope.train.roles import ModelBase, TrainBatch
from kinetoscope.train.trainer import Trainer
from train.post_runs import write_recipe


def roles_of(**options: dict[str, Any]) -> dict[str, Any]:
    """The `models` section of DMD2 with further options of roles."""
    frozen = {"student": True, "critic": True, "teacher": False}
    return {n: {"init_from": "x", "trainable": t, **options.get(n, {})} for n, t in frozen.items()}


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        (
            {"method": {"name": "dmd2"}, "models": roles_of(critic={"shift": 3.0})},
            "models.critic.shift=3.0 has no effect",
        ),
        (
            {"method": {"name": "dmd2"}, "models": roles_of(student={"uncond": "zero"})},
            "models.student.uncond=zero has",
        ),
        (
            {"method": {"name": "dmd2", "guidance": 1}, "models": roles_of(teacher={"uncond": "zero"})},
            "models.teacher.uncond=zero has no effect: method.guidance=1",
        ),
        ({"method": {"name": "dmd2", "rollout": "data_latent"}, "models": roles_of()}, "gives prompts without latents"),
        (
            {"method": {"name": "self_forcing"}, "models": roles_of(student={"compile": True})},
            "models.student.compile=True has no effect: rollouts go block by block",
        ),
        (
            {
                "method": {"name": "dmd2"},
                "models": roles_of(critic={"optimizer": {"learning_rate": 1.0, "ema": 0.9}}),
            },
            "models.critic.optimizer.ema has no effect",
        ),
    ],
)
def test_options_without_effect_are_refused(tmp_path: Path, sections: dict[str, Any], says: str) -> None:
    data = {"source": "world", "world": {"name": "shapes"}, "latents": "none"}
    with pytest.raises(ConfigError, match=says):
        load_post_recipe(write_recipe(tmp_path, tmp_path, data=data, **sections))


@pytest.mark.parametrize(
    ("student", "method", "says"),
    [
        ({"shift": 3.0}, {"name": "ode_distill"}, "models.student.shift=3.0 has no effect: noise levels are those of"),
        ({"attention": "vsa"}, {"name": "sparse_finetune"}, "models.student.attention=vsa has no effect"),
        ({"uncond": "zero"}, {"name": "finetune", "caption_dropout": 0}, "models.student.uncond=zero has no effect"),
    ],
)
def test_options_of_a_student_without_effect_are_refused(
    tmp_path: Path, student: dict[str, Any], method: dict[str, Any], says: str
) -> None:
    models = {"student": {"init_from": "x", "trainable": True, **student}}
    with pytest.raises(ConfigError, match=says):
        load_post_recipe(write_recipe(tmp_path, tmp_path, models=models, method=method))


@pytest.mark.parametrize("option", [{"export": {"share": "tiny-t2v"}}, {"export": {"dtype": "bfloat16"}}])
def test_directory_options_are_refused_when_a_lora_is_exported(tmp_path: Path, option: dict[str, Any]) -> None:
    models = {"student": {"init_from": "x", "trainable": True, "lora": {}}}
    with pytest.raises(ConfigError, match=r"export\.(share|dtype)=.* is of a directory"):
        load_post_recipe(write_recipe(tmp_path, tmp_path, models=models, **option))


def test_learning_goes_on_when_a_schedule_is_shorter_than_the_loop(model: Path, tmp_path: Path) -> None:
    short = ["optimizer.steps=1", "optimizer.warmup=1", "optimizer.final_fraction=1.0", "optimizer.weight_decay=0"]
    run_post_recipe(write_recipe(tmp_path, model), short)
    found = load_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000003.pt")
    assert found["step"] == 3 and found["roles"][STUDENT]["optimizer"]["param_groups"][0]["lr"] == 0.01


class TwiceRead:
    """A loss of a prediction with a gradient after one of the same weights without."""

    settings_class: ClassVar[type[MethodSettings]] = MethodSettings
    needs: ClassVar[tuple[str, ...]] = ("student",)

    def __init__(self, roles: Mapping[str, ModelBase], settings: MethodSettings) -> None:
        self.roles, self.settings = roles, settings

    def updates(self, step: int) -> Sequence[str]:
        return ("student",)

    def losses(self, role: str, batch: TrainBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        s = torch.full((batch.rows,), 0.5)
        with torch.no_grad():
            first = self.roles[role].predict(batch.latents, s, batch)
        return {"total": (self.roles[role].predict(first, s, batch)).square().mean()}


def test_weights_keep_their_gradients_in_bfloat16_when_first_used_without(model: Path, tmp_path: Path) -> None:
    """What autocast keeps of a weight from a pass under no_grad must not be used in a pass with a gradient."""
    register_method("twice_read", "train.test_recipe_options:TwiceRead")
    recipe = load_post_recipe(
        write_recipe(tmp_path, model, method={"name": "twice_read"}), ["loop.precision=bfloat16", "loop.accumulate=1"]
    )
    trainer = Trainer(recipe, tmp_path)
    trainer.step(0)
    weights = {n: p for n, p in trainer.roles[STUDENT].opened.transformer.named_parameters() if p.ndim > 1}
    without = [n for n, p in weights.items() if p.grad is None or not p.grad.any()]
    assert not without, f"no gradient reached {without[:3]}"
