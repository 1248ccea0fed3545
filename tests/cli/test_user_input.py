"""Names, numbers and texts of users, wherever they are read: used, or refused in one line that shows them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kinetoscope.cli import main
from kinetoscope.cli.options import read_prompts
from kinetoscope.core.errors import KinetoscopeError, shown
from kinetoscope.evaluation.traces import read_trace
from kinetoscope.media import contact_sheet, load_clip, load_picture, read_metadata, read_video, write_video
from kinetoscope.media.actions import load_actions
from kinetoscope.media.camera import load_camera
from kinetoscope.media.preview import PreviewFile
from kinetoscope.pipelines.catalogue import find_model
from kinetoscope.runtime.ab import compare_files
from kinetoscope.runtime.caches import write_calibration
from kinetoscope.runtime.generator import VideoGenerator
from kinetoscope.runtime.replay import replay
from kinetoscope.train.data.preprocess import preprocess
from kinetoscope.train.data.sources import open_source
from kinetoscope.train.data.table import DataSet
from kinetoscope.train.recipe import read_recipe

FRAMES = np.zeros((2, 32, 32, 3), np.uint8)
ODD = (
    "a\0b",
    "a\0b.json",
    "\ud800",
    "n" * 300,
    "n" * 300 + ".json",
    "d/" * 3000 + "a.json",
    os.fsdecode(b"\xff"),
    "-x.json",
)
READERS: dict[str, Callable[[str], Any]] = {
    "image": load_picture, "video": load_clip, "compared video": read_video, "record": read_metadata,
    "replay": replay, "model": find_model, "source": open_source, "data set": DataSet, "recipe": read_recipe,
    "prompts": read_prompts, "trace": lambda name: read_trace(Path(name)),
    "actions": lambda name: load_actions(name, "universal"), "camera": lambda name: load_camera(name, 5),
    "folders": lambda name: compare_files(Path(name), Path(name)),
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
def test_names_that_cannot_be_read_are_refused(reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ODD:
        with pytest.raises(KinetoscopeError):
            READERS[reader](name)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def generator() -> VideoGenerator:
    return VideoGenerator.from_pretrained("tiny-t2v", device="cpu")


def test_names_that_a_generator_cannot_use_are_refused_before_a_step(
    generator: VideoGenerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 1}
    for name in ODD[:6]:
        with pytest.raises(KinetoscopeError):
            generator.load_lora(name)
        for fields in ({"preview": name}, {"output_path": name + ".mp4"}, {"output_path": name}):
            events: list[str] = []
            with pytest.raises(KinetoscopeError):
                generator.generate_video(
                    "a cat", **small, **fields, on_event=lambda e, seen=events: seen.append(e.kind)
                )
            assert "step" not in events
    assert list(tmp_path.iterdir()) == []


def test_names_that_cannot_be_written_leave_nothing(
    generator: VideoGenerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    writers: dict[str, Callable[[str], Any]] = {
        "video": lambda name: write_video(name + ".mp4", FRAMES, 8),
        "sheet": lambda name: contact_sheet([FRAMES], name),
        "preview": lambda name: PreviewFile(Path(name + ".png")).add(FRAMES),
        "calibration": lambda name: write_calibration(generator.pipeline.model, "magcache", {}, name),
        "data set": lambda name: preprocess("tiny-t2v", "world:shapes", name, clips=1),
    }
    for name in ODD[:6]:
        for write in writers.values():
            with pytest.raises(KinetoscopeError) as caught:
                write(name)
            assert len(str(caught.value)) < 300
    for name in ("", "."):
        with pytest.raises(KinetoscopeError):
            contact_sheet([FRAMES], name)
    assert list(tmp_path.iterdir()) == []


def test_companions_of_a_video_are_checked_before_it_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--size", "32x32", "--frames", "5", "--steps", "1"]
    name = "n" * 250
    assert main(["generate", "a cat", *small, "-o", str(tmp_path / f"{name}.mp4"), "--trace"]) == 1
    assert "261 bytes, and 255" in capsys.readouterr().err
    preview = ["--preview", str(tmp_path / f"{name}.png"), "--num-videos", "2"]
    assert main(["generate", "a cat", *small, "-o", str(tmp_path), *preview]) == 1
    assert "256 bytes, and 255" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["generate", "a", "--threads", "9" * 20], "threads=99999999999999999999 is outside"),
        (["generate", "a", "--num-videos", "9" * 20], "--num-videos=99999999999999999999 is outside"),
        (["generate", "a", "--seed", str(2**32)], "seed=0 starts from the same noise"),
        (["eval", "--n", "9" * 20], "--n=99999999999999999999 is outside"),
        (["eval", "--seed", "-1"], "--seed=-1 is outside"),
        (["calibrate", "tiny-t2v", "--cache", "magcache", "--seed", "-1"], "--seed=-1 is outside"),
        (["calibrate", "tiny-t2v", "--cache", "magcache", "--n", "9" * 20], "--n=99999999999999999999 is outside"),
        (["plan", "tiny-t2v", "--gpus", "9" * 20], "--gpus=99999999999999999999 is outside"),
        (["plan", "tiny-t2v", "--tflops", "inf"], "tflops=inf is outside"),
        (["ab", "--b", "cfg=batched", "--repeats", "9" * 20], "repeats=99999999999999999999 is outside"),
        (["ab", "--b", "cfg=batched", "--warmup", "-1"], "warmup=-1 is outside"),
        (["fit-preview", "tiny-t2v", "--clips", "9" * 20], "--clips=99999999999999999999 is outside"),
        (["preprocess", "tiny-t2v", "world:shapes", "x", "--clips", "9" * 20], "say how many"),
        (["preprocess", "tiny-t2v", "world:shapes", "x", "--clips", "1", "--fps", "0"], "fps=0"),
        (["preprocess", "tiny-t2v", "world:shapes", "x", "--clips", "1", "--threads", "9" * 20], "threads=9999"),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused_by_name(
    argv: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert says in error and "--debug" not in error


def test_text_files_are_read_with_or_without_a_byte_order_mark(tmp_path: Path) -> None:
    """As Windows' editors write them: with the mark, and with carriage returns."""
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffein Bär\r\n\r\na cat\r\n".encode())
    assert read_prompts(str(path)) == ["ein Bär", "a cat"]
    path.write_bytes("\ufeffsteps: 3\r\n".encode())
    assert read_recipe(path) == {"steps": 3}
    path.write_bytes("ein Bär".encode("latin-1"))
    for read in (lambda: read_prompts(str(path)), lambda: read_recipe(path)):
        with pytest.raises(KinetoscopeError, match=r"not text in UTF-8 \(byte 5\)"):
            read()


def test_deeply_nested_files_are_refused(tmp_path: Path) -> None:
    deep = tmp_path / "a.json"
    deep.write_text("[" * 200_000)
    for read in (
        lambda: load_actions(deep, "universal"), lambda: load_camera(deep, 5), lambda: read_trace(deep),
        lambda: read_recipe(deep),
    ):  # fmt: skip
        with pytest.raises(KinetoscopeError):
            read()


def test_shown_values_are_short() -> None:
    assert shown(3) == "3" and shown("a") == "'a'" and shown(None) == "None"
    if sys.get_int_max_str_digits():
        assert shown(-(10**5000)) == "a whole number of 16610 bits"
    for value in ("x" * 10**6, [1] * 10**6, {i: i for i in range(1000)}, 10**300):
        assert len(shown(value)) < 200
