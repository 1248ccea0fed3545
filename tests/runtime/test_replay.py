"""A video carries what made it, and can be made again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from kinetoscope import VideoGenerator
from kinetoscope.core.errors import InputError, ModelLoadError
from kinetoscope.engine.hooks.base import Interceptor
from kinetoscope.media import read_metadata
from kinetoscope.runtime.replay import replay
from tiny import make_tiny_wan

SMALL: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 3, "fps": 8}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make_tiny_wan(tmp_path / "model")


def test_replay_gives_the_same_bytes_and_restores_the_threads(tiny: Path, tmp_path: Path) -> None:
    generator = VideoGenerator.from_pretrained(tiny, device="cpu", scheduler="dpm++", threads=2)
    first = generator.generate_video(
        "a red cat", "a circle", seed=7, output_path=tmp_path / "a.mp4", trace=True, **SMALL
    )
    torch.set_num_threads(1)
    report = replay(first.path, tmp_path / "b.mp4")
    assert report.identical and report.differences == ()
    assert torch.get_num_threads() == 2
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_a_video_of_a_batch_replays_with_its_batch(tiny: Path, tmp_path: Path) -> None:
    generator = VideoGenerator.from_pretrained(tiny, device="cpu")
    generator.generate_video(["a cat", "a circle"], seed=[1, 2], batch_size=2, output_path=tmp_path / "out", **SMALL)
    path = tmp_path / "out" / "1-a-circle-2.mp4"
    assert read_metadata(path)["batch"]["prompts"] == ["a cat", "a circle"]
    assert replay(path).identical


def test_changed_weights_are_refused(tiny: Path, tmp_path: Path) -> None:
    generator = VideoGenerator.from_pretrained(tiny, device="cpu")
    path = generator.generate_video("a cat", output_path=tmp_path / "a.mp4", **SMALL).path
    shutil.rmtree(tiny)
    make_tiny_wan(tiny, seed=5)
    with pytest.raises(ModelLoadError, match="changed since"):
        replay(path)


def test_what_a_file_cannot_hold_is_refused(tiny: Path, tmp_path: Path) -> None:
    class Mine(Interceptor):
        name = "mine"

    generator = VideoGenerator.from_pretrained(tiny, device="cpu")
    noise = torch.zeros(16, 2, 4, 4)
    path = generator.generate_video("a cat", latents=noise, output_path=tmp_path / "a.mp4", **SMALL).path
    with pytest.raises(InputError, match="latents"):
        replay(path)
    path = generator.generate_video("a cat", hooks=[Mine()], output_path=tmp_path / "b.mp4", **SMALL).path
    with pytest.raises(InputError, match="mine"):
        replay(path)
