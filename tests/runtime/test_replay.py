"""A video carries what made it, and can be made again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kinetoscope import VideoGenerator
from kinetoscope.core.errors import InputError, ModelLoadError
from kinetoscope.engine.hooks.base import Interceptor
from kinetoscope.media import read_metadata, read_video, write_video
from kinetoscope.runtime.replay import replay
from lora_files import factors, tensors
from tiny import make_tiny_wan

SMALL: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 3, "fps": 8}


def write_lora(path: Path, seed: int = 0) -> Path:
    save_file(tensors("diffusers", factors(seed)), path)
    return path


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


def test_video_of_a_list_is_recorded_and_replayed_without_its_neighbours(tiny: Path, tmp_path: Path) -> None:
    generator = VideoGenerator.from_pretrained(tiny, device="cpu")
    generator.generate_video(["a cat", "a circle"], seed=[1, 2], batch_size=2, output_path=tmp_path / "out", **SMALL)
    path = tmp_path / "out" / "1-a-circle-2.mp4"
    record = read_metadata(path)
    assert record["joined"] == 2 and record["prompt"] == "a circle" and "a cat" not in json.dumps(record)
    report = replay(path, files=tmp_path)
    assert report.same and report.joined == 2
    other = tmp_path / "other.mp4"
    wrong = {**record, "seed": 3}
    write_video(other, read_video(path)[0], 8, metadata=wrong)
    assert not replay(other).same


def test_record_holds_no_path_and_replay_finds_its_files(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    lora = write_lora(folder / "style.safetensors")
    (tmp_path / "calibration").mkdir()
    generator = VideoGenerator.from_pretrained(tiny, device="cpu", lora=str(lora))
    path = generator.generate_video("a cat", output_path=tmp_path / "a.mp4", **SMALL).path
    record = read_metadata(path)
    assert str(tmp_path) not in json.dumps(record)
    assert record["options"]["lora"][0]["path"] == "style.safetensors" and record["model"] == "model"
    with pytest.raises(ModelLoadError, match=r"LoRA style: no file 'style.safetensors' .*--files"):
        replay(path)
    assert replay(path, files=folder).identical
    moved = tmp_path / "elsewhere"
    shutil.move(tiny, moved)
    with pytest.raises(ModelLoadError, match=r"model 'model' .*--model"):
        replay(path, files=folder)
    assert replay(path, model=str(moved), files=folder).identical
    write_lora(lora, seed=5)
    with pytest.raises(ModelLoadError, match="changed since"):
        replay(path, model=str(moved), files=folder)


def test_record_of_format_2_is_replayed_with_its_batch(tiny: Path, tmp_path: Path) -> None:
    generator = VideoGenerator.from_pretrained(tiny, device="cpu")
    results = generator.generate_video(["a cat", "a circle"], seed=[1, 2], batch_size=2, **SMALL)
    record = {k: v for k, v in results[1].record.items() if k not in ("joined", "negative_prompt")}
    negative = results[1].record["negative_prompt"]
    batch = {"index": 1, "prompts": ["a cat", "a circle"], "negative_prompts": [negative] * 2, "seeds": [1, 2]}
    path = write_video(
        tmp_path / "old.mp4", results[1].frames, 8, metadata={**record, "format": 2, "model": str(tiny), "batch": batch}
    )
    assert replay(path).identical


def test_changed_weights_are_refused(tiny: Path, tmp_path: Path) -> None:
    generator = VideoGenerator.from_pretrained(tiny, device="cpu")
    path = generator.generate_video("a cat", output_path=tmp_path / "a.mp4", **SMALL).path
    shutil.rmtree(tiny)
    make_tiny_wan(tiny, seed=5)
    with pytest.raises(ModelLoadError, match="changed since"):
        replay(path)


def test_folders_that_were_searched_are_named_once(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = VideoGenerator.from_pretrained(tiny, device="cpu")
    path = generator.generate_video("a cat", output_path=tmp_path / "a.mp4", **SMALL).path
    tiny.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelLoadError, match=rf"is in none of {tmp_path}; .*--model"):
        replay(path)


def test_what_a_file_cannot_hold_is_refused(tiny: Path, tmp_path: Path) -> None:
    class Mine(Interceptor):
        name = "mine"

    generator = VideoGenerator.from_pretrained(tiny, device="cpu")
    noise = torch.zeros(16, 2, 4, 4)
    path = generator.generate_video("a cat", latents=noise, output_path=tmp_path / "a.mp4", **SMALL).path
    with pytest.raises(InputError, match=r"made with latents of the request, .* make it again as it was made"):
        replay(path)
    path = generator.generate_video("a cat", hooks=[Mine()], output_path=tmp_path / "b.mp4", **SMALL).path
    with pytest.raises(InputError, match="mine"):
        replay(path)
