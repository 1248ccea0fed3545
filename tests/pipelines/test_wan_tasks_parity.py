"""Wan's image, video and two-expert tasks against diffusers' pipelines, on the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kinetoscope import VideoGenerator
from kinetoscope.core.errors import InputError
from tiny import make_tiny_wan

PROMPT, NEGATIVE = "a red circle moving left on black", "a blue cat"
STEPS = 8
FRAMES, HEIGHT, WIDTH = 9, 32, 48
KINDS = {
    "i2v": "WanImageToVideoPipeline",
    "flf2v": "WanImageToVideoPipeline",
    "a14b": "WanPipeline",
    "i2v-a14b": "WanImageToVideoPipeline",
    "ti2v": "WanPipeline",
    "ti2v-i2v": "WanImageToVideoPipeline",
}


def picture(seed: int) -> Image.Image:
    """Smooth random colours at the size of the request."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def open_pair(path: Path, oracle_class: str) -> tuple[VideoGenerator, Any]:
    import diffusers

    oracle = getattr(diffusers, oracle_class).from_pretrained(path)
    oracle.set_progress_bar_config(disable=True)
    return VideoGenerator.from_pretrained(path, device="cpu", dtype="float32"), oracle


def compare(
    pair: tuple[VideoGenerator, Any], guidance: float, ours_more: dict[str, Any], theirs_more: dict[str, Any]
) -> None:
    """Final latents of two samples within 1e-4 of their deviation."""
    ours, oracle = pair
    if "image" in theirs_more:  # diffusers takes one image and one prompt
        seeds = [3]
    else:
        seeds = [3, 4]
    size = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS, "guidance_scale": guidance}
    if "video" not in theirs_more:
        size["num_frames"] = FRAMES
    theirs = oracle(
        prompt=[PROMPT] * len(seeds), negative_prompt=[NEGATIVE] * len(seeds),
        generator=[torch.Generator().manual_seed(s) for s in seeds], output_type="latent", **size, **theirs_more,
    ).frames  # fmt: skip
    results = ours.generate_video(
        [PROMPT] * len(seeds), NEGATIVE, seed=seeds, **size | {"num_frames": FRAMES}, **ours_more
    )
    for result, expected in zip(results, theirs, strict=True):
        assert (result.latents - expected).abs().max() <= 1e-4 * expected.std()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[VideoGenerator, Any]]:
    found = {}
    for kind, oracle in KINDS.items():
        scheduler = "euler" if kind == "i2v-a14b" else "unipc"
        found[kind] = open_pair(make_tiny_wan(tmp_path_factory.mktemp(kind), kind=kind, scheduler=scheduler), oracle)
    return found


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("kind", ["i2v", "i2v-a14b", "ti2v-i2v"])
def test_image_to_video(pairs: dict[str, Any], kind: str, guidance: float) -> None:
    compare(pairs[kind], guidance, {"image": picture(0)}, {"image": picture(0)})


@pytest.mark.parametrize("kind", ["flf2v", "i2v-a14b"])
def test_first_and_last_frame(pairs: dict[str, Any], kind: str) -> None:
    both = {"image": picture(0), "last_image": picture(1)}
    compare(pairs[kind], 4.0, both, both)


@pytest.mark.parametrize("scales", [(4.0, 3.0), (4.0, None), (2.0, 1.0)])
def test_two_experts(pairs: dict[str, Any], scales: tuple[float, float | None]) -> None:
    more = {"guidance_scale_2": scales[1]}
    compare(pairs["a14b"], scales[0], more, more)


def test_frame_wise_time_without_an_image(pairs: dict[str, Any]) -> None:
    compare(pairs["ti2v"], 5.0, {}, {})


def test_frame_wise_time_with_an_image(pairs: dict[str, Any]) -> None:
    """The published TI2V directory is a WanPipeline; diffusers opens it with its image pipeline for an image."""
    ours, _ = pairs["ti2v"]
    _, oracle = open_pair(ours.pipeline.model.path, "WanImageToVideoPipeline")
    compare((ours, oracle), 5.0, {"image": picture(2)}, {"image": picture(2)})


@pytest.mark.parametrize("strength", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("scheduler", ["unipc", "euler"])
def test_video_to_video(tmp_path: Path, scheduler: str, strength: float) -> None:
    pair = open_pair(make_tiny_wan(tmp_path, scheduler=scheduler), "WanVideoToVideoPipeline")
    video = [picture(i) for i in range(FRAMES)]
    theirs = {"video": [video, video], "strength": strength}
    compare(pair, 5.0, {"video": np.stack([np.asarray(p) for p in video]), "strength": strength}, theirs)


def test_an_image_matters(pairs: dict[str, Any]) -> None:
    """The comparisons above can fail: another image is far outside their tolerance."""
    ours, _ = pairs["i2v"]
    size = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "num_inference_steps": 2}
    first, second = (ours.generate_video(PROMPT, image=picture(i), **size).latents for i in (0, 1))
    assert (first - second).abs().max() > 1e-2 * first.std()


def test_an_expert_that_serves_no_step_is_not_loaded(tmp_path: Path) -> None:
    generator = VideoGenerator.from_pretrained(make_tiny_wan(tmp_path, kind="a14b"), device="cpu")
    size = {"height": HEIGHT, "width": WIDTH, "num_frames": 5, "num_inference_steps": 1}
    generator.generate_video(PROMPT, **size)
    assert "transformer_2" not in generator.pipeline.loaded_modules()


def test_a_directory_has_the_tasks_it_takes_inputs_for(pairs: dict[str, Any]) -> None:
    assert {kind: ours.pipeline.tasks for kind, (ours, _) in pairs.items()} == {
        "i2v": ("i2v",),
        "flf2v": ("flf2v",),
        "a14b": ("t2v", "v2v"),
        "i2v-a14b": ("i2v", "flf2v"),
        "ti2v": ("t2v", "v2v", "i2v"),
        "ti2v-i2v": ("i2v",),
    }


@pytest.mark.parametrize(
    ("kind", "fields", "says"),
    [
        ("a14b", {"image": picture(0)}, "takes no image"),
        ("i2v", {}, "needs image="),
        ("flf2v", {"image": picture(0)}, "needs last_image="),
        ("i2v", {"image": picture(0), "last_image": picture(1)}, "takes no last_image"),
        ("i2v", {"image": "nowhere.png"}, "nowhere.png"),
        ("i2v", {"image": np.zeros((4, 4), np.int32)}, "int32"),
        ("i2v", {"image": np.full((4, 4, 3), 2.0)}, r"outside \[0, 1\]"),
        ("i2v", {"image": 3}, "type int"),
        ("a14b", {"strength": 0.5}, "without a video"),
        ("a14b", {"video": np.zeros((3, 8, 8, 3), np.uint8)}, "has 3 frames"),
        ("a14b", {"video": np.zeros((8, 8, 3), np.uint8)}, "should be"),
        ("a14b", {"video": np.zeros((9, 8, 8, 3), np.uint8), "strength": 0.01}, "leaves none"),
        ("a14b", {"video": np.zeros((9, 8, 8, 3), np.uint8), "strength": 1.5}, "outside"),
        ("a14b", {"guidance_scale_2": 0.5}, "guidance_scale_2"),
        ("a14b", {"image_stength": 0.5}, "unknown parameter 'image_stength'"),
        ("ti2v-i2v", {"image": picture(0), "num_frames": 1}, "num_frames=1 are the image alone; ask for 5"),
    ],
)
def test_inputs_that_are_refused(pairs: dict[str, Any], kind: str, fields: dict[str, Any], says: str) -> None:
    ours, _ = pairs[kind]
    with pytest.raises(InputError, match=says):
        size = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "num_inference_steps": 2}
        ours.generate_video(PROMPT, **size | fields)
