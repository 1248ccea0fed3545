"""The embedded models: small enough to ship, loaded by diffusers too, and true to their cards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kinetoscope import VideoGenerator
from kinetoscope.engine.protocols import Event
from kinetoscope.evaluation import flicker, heldout_specs, prompt_following
from kinetoscope.evaluation.playing import Walk, action_following, play
from kinetoscope.loading import resolve_model
from kinetoscope.reference import embedded_models
from kinetoscope.worlds import get_world

MEBIBYTE = 2**20
PROMPTS = ["a large red circle moving left on a black background", "a small blue star moving up on a white background"]


def test_all_fit_into_the_package() -> None:
    sizes = {
        name: sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) for name, path in embedded_models().items()
    }
    assert "tiny-t2v" in sizes
    assert sizes["tiny-t2v"] <= 10 * MEBIBYTE
    assert sum(sizes.values()) <= 32 * MEBIBYTE


@pytest.mark.parametrize("name", sorted(embedded_models()))
def test_every_model_has_a_card_and_defaults(name: str) -> None:
    model = resolve_model(name)
    card = (model.path / "README.md").read_text(encoding="utf-8")
    for words in ("kinetoscope train", "seed", "wall time", "## Scores", "kinetoscope eval"):
        assert words in card
    VideoGenerator.from_pretrained(name, device="cpu").defaults()


def test_diffusers_loads_it_and_makes_the_same_video() -> None:
    from diffusers import WanPipeline

    ours = VideoGenerator.from_pretrained("tiny-t2v", device="cpu", dtype="float32")
    fields: dict[str, Any] = {"num_inference_steps": 8, "guidance_scale": 4.0}
    result = ours.generate_video(PROMPTS[0], seed=3, **fields)
    oracle = WanPipeline.from_pretrained(embedded_models()["tiny-t2v"], torch_dtype=torch.float32)
    oracle.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 33, "negative_prompt": "", **fields}
    latents = oracle(PROMPTS[0], generator=torch.Generator().manual_seed(3), output_type="latent", **call).frames[0]
    assert (result.latents - latents).abs().max() <= 1e-4 * latents.std()
    video = oracle(PROMPTS[0], generator=torch.Generator().manual_seed(3), **call).frames[0]
    assert np.abs(result.frames - video * 255.0).max() <= 1.0


@pytest.mark.parametrize("name", ["tiny-t2v-4step", "tiny-causal"])
def test_students_share_what_is_not_theirs(name: str) -> None:
    teacher, student = resolve_model("tiny-t2v"), resolve_model(name)
    for component in ("vae", "text_encoder", "tokenizer"):
        assert student.folder(component) == teacher.folder(component)
    assert student.folder("transformer").parent == student.path


def test_the_student_takes_four_steps_without_guidance() -> None:
    student = VideoGenerator.from_pretrained("tiny-t2v-4step", device="cpu")
    steps = [e for e in student.iterate(PROMPTS[0], seed=1) if isinstance(e, Event) and e.kind == "step"]
    assert len(steps) == 4
    assert student.defaults().guidance_scale == 1.0


def test_the_causal_student_streams_what_it_makes_at_once() -> None:
    student = VideoGenerator.from_pretrained("tiny-causal", device="cpu")
    whole = student.generate_video(PROMPTS[0], seed=1, num_frames=45).frames
    streamed = list(student.stream(PROMPTS[0], seed=1, blocks=4))
    assert np.array_equal(np.concatenate(streamed), whole)
    assert student.defaults().guidance_scale == 1.0 and student.defaults().num_inference_steps == 4


@pytest.mark.parametrize("name", ["tiny-t2v", "tiny-t2v-4step", "tiny-causal"])
def test_they_show_what_they_are_told(name: str) -> None:
    """Colour, motion and background; of shapes not quite all follow (model cards)."""
    world = get_world("shapes")
    results = VideoGenerator.from_pretrained(name, device="cpu").generate_video(PROMPTS, seed=1)
    seen = [world.judge(r.frames) for r in results]
    assert [s["colour"] for s in seen] == ["red", "blue"]
    assert [s["background"] for s in seen] == ["black", "white"]
    assert [s["motion"] for s in seen] == ["moving left", "moving up"]
    assert all(flicker(r.frames) < 2 for r in results)


def test_the_maze_moves_as_keys_and_mouse_say() -> None:
    """Well over three quarters, where chance is a seventh; a few games tell no more (model card)."""
    world: Any = get_world("maze")
    generator = VideoGenerator.from_pretrained("tiny-world", device="cpu", dtype="float32")
    walks: list[Walk] = []
    for seed in range(5):
        first = world.game(64, 64).reset(seed)
        with generator.start_session(image=first, seed=seed) as session:
            walks.append(play(world, session, first, seed, 81))
    assert action_following(world, walks)["all correct"].value > 0.85
    assert np.mean([world.is_view(w.frames).mean() for w in walks]) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-t2v", "tiny-t2v-4step", "tiny-causal"])
def test_the_scores_of_the_card_hold(name: str) -> None:
    """A smaller sample than the card's: its score must lie within the card's interval, widened by its own."""
    path = Path(__file__).parents[2] / "benchmarks" / "results" / f"eval_{name}.json"
    card = json.loads(path.read_text(encoding="utf-8"))["model"]
    world, count = get_world("shapes"), 64
    specs = heldout_specs(world, count, seed=77)
    generator = VideoGenerator.from_pretrained(name, device="cpu")
    results = generator.generate_video([s.caption() for s in specs], seed=list(range(count)), batch_size=8)
    report = prompt_following(world, zip(specs, (r.frames for r in results), strict=True))
    for attribute, score in report.items():
        assert score.interval[0] <= card[attribute]["high"] and score.interval[1] >= card[attribute]["low"], attribute
