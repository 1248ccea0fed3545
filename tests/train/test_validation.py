"""Validation videos in training: every family, prompts and images of the recipe, described and played worlds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from kinetoscope.core.errors import ConfigError
from kinetoscope.train.plugins import Opened
from kinetoscope.train.post import ValidationSection
from kinetoscope.train.post_run import run_post_recipe
from kinetoscope.train.validation import ValidationVideos
from models.tiny_cosmos import without_torchvision
from pipelines.test_matrix_game import make_world
from tiny import make_tiny_wan
from train.post_runs import write_recipe
from train.test_plugins import FAMILIES

PROMPTS = ["a red circle", "a cat"]


def section_of(**values: Any) -> ValidationSection:
    return ValidationSection.model_validate({"every": 1, **values})


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_of_a_recipe_become_videos_in_every_family(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    params = {**family.size, **family.told, "num_inference_steps": 2}
    with without_torchvision():
        videos = ValidationVideos(
            Opened(str(family.make(tmp_path / "model"))), section_of(prompts=PROMPTS, params=params)
        )
        frames = videos.make({})
    assert [f.shape for f in frames] == [(family.frames, 32, 48, 3)] * 2 and frames[0].dtype == np.uint8
    assert [shot.label for shot in videos.shots] == PROMPTS and videos.scores(frames) == {}


def test_a_causal_student_is_validated_on_prompts_of_the_recipe(tmp_path: Path) -> None:
    model = make_tiny_wan(tmp_path / "model")
    causal = {"num_frames_per_block": 1, "steps": [1000, 500]}
    models = {"student": {"init_from": str(model), "trainable": True, "causal": causal}}
    params = {"height": 16, "width": 32, "num_frames": 5}
    validation = {"every": 2, "prompts": PROMPTS, "params": params}
    recipe = write_recipe(
        tmp_path, model, models=models, method={"name": "diffusion_forcing"}, loop={"steps": 2},
        callbacks={"tensorboard": False, "validation": validation},
    )  # fmt: skip
    run_post_recipe(recipe)
    sheet = Image.open(tmp_path / "run" / "validation" / "step-00000002.png")
    assert sheet.width > 9 * 32 and sheet.height > 2 * 16
    lines = (tmp_path / "run" / "validation.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 2, "videos": 2}]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny world that is played, and that its record names."""
    path = make_world(tmp_path_factory.mktemp("world") / "world", "base", converted=True)
    (path / "kinetoscope.json").write_text(json.dumps({"world": "maze"}))
    return path


SIZE = {"height": 32, "width": 48, "num_frames": 21}


def test_a_played_world_is_validated_on_its_own_games(world: Path) -> None:
    videos = ValidationVideos(Opened(str(world)), section_of(videos=2, params=SIZE))
    frames = videos.make({})
    assert [f.shape for f in frames] == [(21, 32, 48, 3)] * 2
    assert [shot.label for shot in videos.shots] == ["game 0", "game 1"]
    scores = videos.scores(frames)
    assert set(scores) == {"turn", "way", "all correct"} and all(0 <= value <= 1 for value in scores.values())


def test_a_played_world_is_validated_on_images_of_the_recipe(world: Path, tmp_path: Path) -> None:
    for number, colour in enumerate(("red", "blue")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{number}.png")
    images = [str(tmp_path / f"{number}.png") for number in range(2)]
    actions = [{"keys": ["w"], "repeat": 21}]
    walking, still = (
        ValidationVideos(Opened(str(world)), section_of(images=images, params={**SIZE, "extra": extra}))
        for extra in ({"actions": actions}, {})
    )
    assert [shot.label for shot in walking.shots] == ["0.png", "1.png"] and walking.scores([]) == {}
    frames, others = walking.make({}), still.make({})
    assert [f.shape for f in frames] == [(21, 32, 48, 3)] * 2
    assert not np.array_equal(frames[0], frames[1]) and not np.array_equal(frames[0], others[0])


def test_validation_attends_as_the_student_is_trained(tmp_path: Path) -> None:
    params = {"height": 16, "width": 32, "num_frames": 5, "num_inference_steps": 1}
    opened = Opened(str(make_tiny_wan(tmp_path / "model")))
    videos, seen = ValidationVideos(opened, section_of(prompts=PROMPTS[:1], params=params)), list[bool]()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
        seen.append(True)
        return nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    kept = opened.pipeline.args
    videos.make({"self": attend})
    assert seen and opened.pipeline.args is kept


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, r"names no world.*set callbacks\.validation\.prompts"),
        ({"images": ["a.png"]}, r"validation\.images: .* takes no image"),
        ({"prompts": PROMPTS, "params": {"num_frames": 4}}, r"callbacks\.validation: num_frames=4"),
        (
            {"prompts": PROMPTS, "params": {"guidance_scale": 1.0, "guidance_rescale": 0.5}},
            r"callbacks\.validation: guidance_rescale=0\.5: needs an unconditional row",
        ),
        (
            {"prompts": PROMPTS, "params": {"extra": {"actions": "a"}}},
            r"params\.extra\.actions: this model has no such",
        ),
        ({"prompts": ["word " * 2000]}, r"callbacks\.validation"),
    ],
)
def test_settings_of_validation_are_refused_before_the_first_step(
    tmp_path: Path, values: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        ValidationVideos(Opened(str(make_tiny_wan(tmp_path / "model"))), section_of(**values))


def test_a_played_world_refuses_prompts(world: Path) -> None:
    with pytest.raises(ConfigError, match=r"validation\.prompts: .* reads no prompts"):
        ValidationVideos(Opened(str(world)), section_of(prompts=PROMPTS))
