"""Data sets: rows against the pipeline's own stages, every source alike, bad clips, full disks, kills."""

from __future__ import annotations

import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kinetoscope.cli import main
from kinetoscope.core.errors import ConfigError, InputError, OutputError
from kinetoscope.core.types import ExecutionArgs
from kinetoscope.loading import resolve_model
from kinetoscope.media import fit_picture, load_clip, write_video
from kinetoscope.pipelines.presets import build_pipeline
from kinetoscope.pipelines.stages.images import encode_video
from kinetoscope.pipelines.stages.text import TextEncodingStage
from kinetoscope.train.data import preprocess as job
from kinetoscope.train.data.clips import read_pictures
from kinetoscope.train.data.preprocess import Summary, claimed, preprocess
from kinetoscope.train.data.sources import Item, Place, open_source
from kinetoscope.train.data.table import DATASET, INDEX, DataSet, Manifest, shard_path
from kinetoscope.worlds import get_world
from tiny import make_tiny_wan

SETTINGS: dict[str, Any] = {"sizes": [(32, 32), (32, 64)], "frames": [5, 9], "fps": 12.0, "shard": 2}
CAPTIONS = {"a": "a red circle", "b/c": "a blue square moving", "d": "a small cat", "e": "a cat on black"}
SHAPES = {"a": (9, 32, 32), "b/c": (6, 48, 80), "d": (12, 32, 32), "e": (9, 40, 40)}
"""Frames, height and width of the good clips."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_wan(tmp_path_factory.mktemp("model"))


def film(path: Path, frames: int, height: int, width: int, seed: int = 0) -> Path:
    """Blocks of random colours."""
    small = np.random.default_rng(seed).integers(0, 256, (frames, height // 8, width // 8, 3), np.uint8)
    return write_video(path, small.repeat(8, 1).repeat(8, 2), 12)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for seed, (name, caption) in enumerate(CAPTIONS.items()):
        film(folder / f"{name}.mp4", *SHAPES[name], seed)
        (folder / f"{name}.txt").write_text(caption)
    return folder


@pytest.fixture(scope="module")
def bad_clips(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The good clips among ones that give no row."""
    folder = tmp_path_factory.mktemp("bad") / "clips"
    shutil.copytree(clips, folder)
    whole = film(folder / "whole.mp4", 9, 64, 64).read_bytes()
    (folder / "whole.mp4").unlink()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) * 6 // 10])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "garbage.mp4").write_bytes(b"no video at all" * 100)
    film(folder / "short.mp4", 3, 32, 32)
    film(folder / "tiny.mp4", 9, 16, 16)
    film(folder / "silent.mp4", 9, 32, 32)
    film(folder / "untold.mp4", 9, 32, 32)
    film(folder / "wordy.mp4", 9, 32, 32)
    for name in ("cut", "empty", "garbage", "short", "tiny"):
        (folder / f"{name}.txt").write_text("a cat")
    (folder / "silent.txt").write_text(" \n")
    (folder / "wordy.txt").write_text("cat " * 600)
    return folder


REASONS = {
    "cut.mp4": "truncated", "empty.mp4": "cannot be read as a video", "garbage.mp4": "cannot be read as a video",
    "short.mp4": "3 frames at 12 a second; the shortest bucket needs 5", "tiny.mp4": "16x16, smaller than its bucket",
    "silent.mp4": "its caption is empty", "untold.mp4": "it has no caption", "wordy.mp4": "601 tokens",
}  # fmt: skip


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return list(DataSet(folder))


def same_rows(a: Path, b: Path) -> None:
    """Equal in everything but the names of the items."""
    ours, theirs = rows_of(a), rows_of(b)
    assert len(ours) == len(theirs)
    for mine, yours in zip(ours, theirs, strict=True):
        for name in mine.keys() - {"key"}:
            x, y = mine[name], yours[name]
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, name


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def same_files(a: Path, b: Path) -> None:
    assert {f.name: f.read_bytes() for f in a.iterdir()} == {f.name: f.read_bytes() for f in b.iterdir()}


# -- what a row is ----------------------------------------------------------------------------------------------------


def test_rows_are_what_the_pipeline_encodes(model: Path, clips: Path, tmp_path: Path) -> None:
    made = preprocess(model, clips, tmp_path / "out", **SETTINGS)
    assert (made.rows, made.clips, made.rejected) == (4, 4, [])
    found = {row["key"]: row for row in rows_of(tmp_path / "out")}
    pipeline = build_pipeline(resolve_model(str(model)), ExecutionArgs())
    stage = pipeline.stages["text_encoding"]
    assert isinstance(stage, TextEncodingStage)
    for name, (length, height, width) in SHAPES.items():
        row = found[f"{name}.mp4"]
        frames, across = (5, 64) if name == "b/c" else (9, 32)
        pixels = [fit_picture(p, 32, across) for p in load_clip(clips / f"{name}.mp4")[:frames]]
        video = torch.from_numpy(np.stack(pixels)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        with torch.no_grad():
            expected = encode_video(pipeline.get_module("vae"), video)[0]
        assert torch.equal(row["latents"], expected) and expected.shape == (16, (frames + 3) // 4, 4, across // 8)
        states, lengths = stage.encode([CAPTIONS[name]], torch.device("cpu"))
        assert torch.equal(row["text_states"], states[0, : lengths[0]])
        assert (row["caption"], row["num_frames"], row["height"], row["width"]) == (CAPTIONS[name], frames, 32, across)
        assert (row["source_height"], row["source_width"], row["source_fps"]) == (height, width, 12.0)
        assert (row["fps"], row["duration"], row["start"], row["window"]) == (12.0, frames / 12, 0.0, 0)
        assert length >= frames
    manifest = json.loads((tmp_path / "out" / DATASET).read_text())
    assert (manifest["version"], manifest["identity"]["model"]) == (1, str(model))


def test_rows_are_what_diffusers_encodes(model: Path, clips: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKLWan
    from transformers import AutoTokenizer, UMT5EncoderModel

    preprocess(model, clips, tmp_path / "out", **SETTINGS)
    row = next(r for r in rows_of(tmp_path / "out") if r["key"] == "a.mp4")
    vae: Any = AutoencoderKLWan.from_pretrained(model / "vae")
    pixels = np.stack([np.asarray(p) for p in load_clip(clips / "a.mp4")])
    with torch.no_grad():
        mode = vae.encode(torch.from_numpy(pixels).permute(3, 0, 1, 2)[None] / 127.5 - 1).latent_dist.mode()
        mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
        torch.testing.assert_close(row["latents"], ((mode - mean) / std)[0], rtol=0, atol=2e-5)
        tokens = AutoTokenizer.from_pretrained(model / "tokenizer")(CAPTIONS["a"], return_tensors="pt")
        states = UMT5EncoderModel.from_pretrained(model / "text_encoder")(tokens.input_ids).last_hidden_state[0]
    torch.testing.assert_close(row["text_states"], states, rtol=0, atol=1e-5)


def test_stored_in_half_the_bytes(model: Path, clips: Path, tmp_path: Path) -> None:
    for dtype in ("float32", "float16", "bfloat16"):
        preprocess(model, clips, tmp_path / dtype, **SETTINGS, stored=dtype)
    exact = rows_of(tmp_path / "float32")
    for dtype in (torch.float16, torch.bfloat16):
        for row, full in zip(rows_of(tmp_path / str(dtype).removeprefix("torch.")), exact, strict=True):
            for name in ("latents", "text_states"):
                assert torch.equal(row[name], full[name].to(dtype).float())


def test_long_clips_in_windows(model: Path, tmp_path: Path) -> None:
    film(tmp_path / "in/long.mp4", 25, 32, 32)
    (tmp_path / "in/long.txt").write_text("a cat")
    preprocess(model, tmp_path / "in", tmp_path / "out", **SETTINGS, every_window=True)
    rows = rows_of(tmp_path / "out")
    assert [(r["window"], r["num_frames"], r["start"]) for r in rows] == [(0, 9, 0.0), (1, 9, 0.75), (2, 5, 1.5)]
    preprocess(model, tmp_path / "in", tmp_path / "first", **SETTINGS)
    [first] = rows_of(tmp_path / "first")
    assert torch.equal(first["latents"], rows[0]["latents"])


def test_pictures_at_the_nearest_times(tmp_path: Path) -> None:
    """A clip whose frames tell their number."""
    grey = np.full((8, 16, 16, 3), 0, np.uint8) + (np.arange(8, dtype=np.uint8) * 30).reshape(-1, 1, 1, 1)
    path = write_video(tmp_path / "grey.mp4", grey, 12)
    for fps, expected in {
        12: [0, 1, 2, 3, 4, 5, 6, 7],
        6: [0, 2, 4, 6],
        24: [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7],
        8: [0, 1, 3, 4, 6],
    }.items():
        rate, pictures = read_pictures(Item("x", Place(str(path))), fps)
        shown = [round(float(np.asarray(p).mean()) / 30) for p in pictures]
        assert rate == 12
        if fps in (24, 8):  # ties between two frames may go either way
            exact = [k * 12 / fps for k in range(len(shown))]
            assert len(shown) in (len(expected), len(expected) + 1)
            assert all(abs(a - b) <= 0.5 for a, b in zip(shown, exact, strict=True)), (fps, shown)
        else:
            assert shown == expected, fps
    assert len(read_pictures(Item("x", Place(str(path))), 12, limit=3)[1]) == 3


# -- sources ----------------------------------------------------------------------------------------------------------


def as_jsonl(clips: Path, folder: Path) -> Path:
    rows = [{"video": str(clips / f"{n}.mp4"), "caption": c} for n, c in CAPTIONS.items()]
    (folder / "list.jsonl").write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")
    return folder / "list.jsonl"


def as_csv(clips: Path, folder: Path) -> Path:
    for n in CAPTIONS:  # relative to the file
        (folder / "clips" / n).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clips / f"{n}.mp4", folder / f"clips/{n}.mp4")
    with (folder / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "path"], *([c, f"clips/{n}.mp4"] for n, c in CAPTIONS.items())])
    return folder / "list.csv"


def as_tars(clips: Path, folder: Path) -> Path:
    (folder / "tars").mkdir()
    names = list(CAPTIONS)
    for number, part in enumerate((names[:2], names[2:])):
        with tarfile.open(folder / f"tars/{number}.tar", "w") as archive:
            for name in part:
                archive.add(clips / f"{name}.mp4", f"{name}.mp4")
                if name == "d":
                    (folder / "d.json").write_text(json.dumps({"caption": CAPTIONS["d"]}))
                    archive.add(folder / "d.json", "d.json")
                else:
                    archive.add(clips / f"{name}.txt", f"{name}.txt")
    return folder / "tars"


@pytest.mark.parametrize("write", [as_jsonl, as_csv, as_tars])
def test_every_source_gives_the_same_rows(
    write: Callable[[Path, Path], Path], model: Path, clips: Path, tmp_path: Path
) -> None:
    preprocess(model, clips, tmp_path / "folder", **SETTINGS)
    preprocess(model, write(clips, tmp_path), tmp_path / "other", **SETTINGS)
    same_rows(tmp_path / "folder", tmp_path / "other")
    keys = [row["key"] for row in rows_of(tmp_path / "other")]
    assert len(set(keys)) == 4


def test_worlds(model: Path, tmp_path: Path) -> None:
    preprocess(model, "world:shapes", tmp_path / "out", **{**SETTINGS, "frames": [5]}, clips=3)
    rows = rows_of(tmp_path / "out")
    vae = build_pipeline(resolve_model(str(model)), ExecutionArgs()).get_module("vae")
    for seed, (row, width) in enumerate(zip(rows, (32, 64, 32), strict=True)):
        clip = get_world("shapes").sample(seed, height=32, width=width, num_frames=5)
        assert (row["caption"], row["width"]) == (clip.caption, width)
        with torch.no_grad():
            video = torch.from_numpy(clip.frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
            assert torch.equal(row["latents"], encode_video(vae, video)[0])


def test_damaged_lists(clips: Path, tmp_path: Path) -> None:
    lines = ["{", "[1]", '{"caption": "a cat"}', '{"video": "a.mp4", "caption": 3}', '{"video": "a.mp4"}']
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    problems = [i.problem for i in open_source(str(tmp_path / "x.jsonl")).items]
    for said, expected in zip(problems, ("not JSON", "no object but a list", "names no video", "int", ""), strict=True):
        assert expected in said and bool(expected) == bool(said)
    whole = (as_tars(clips, tmp_path) / "1.tar").read_bytes()
    (tmp_path / "y.tar").write_bytes(whole[: (clips / "d.mp4").stat().st_size // 2])
    assert "ends within" in open_source(str(tmp_path / "y.tar")).items[0].problem
    (tmp_path / "z.csv").write_text("clip,caption\na.mp4,a cat\n")
    (tmp_path / "none").mkdir()
    for source, said in {
        str(tmp_path / "z.csv"): "no column video",
        str(tmp_path / "none"): "holds no clips",
        str(tmp_path / "missing.csv"): "does not exist",
        str(tmp_path / "x.txt"): "give a folder",
        "world:nowhere": "unknown world",
        "world:shapes": "say how many",
    }.items():
        with pytest.raises(InputError, match=said):
            open_source(source)


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_bad_clips_and_a_full_disk(model: Path, bad_clips: Path, clips: Path, tmp_path: Path) -> None:
    made = preprocess(model, bad_clips, tmp_path / "whole", **SETTINGS)
    reasons = {r["key"]: r["reason"] for r in made.rejected}
    assert reasons.keys() == REASONS.keys() and made.rows == 4 and made.clips == 12
    for name, said in REASONS.items():
        assert said in reasons[name], reasons[name]
    assert DataSet(tmp_path / "whole").rejected() == made.rejected
    preprocess(model, clips, tmp_path / "good", **SETTINGS)
    same_rows(tmp_path / "whole", tmp_path / "good")
    sizes = [shard_path(tmp_path / "whole", n).stat().st_size for n in range(6)]
    limit = sorted(sizes)[-1] - 1
    at = sizes.index(limit + 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OutputError, match=rf"cannot be written.*; {2 * at} of 12 clips are done and stay"):
            preprocess(model, bad_clips, tmp_path / "full", **SETTINGS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    left = {f.name for f in (tmp_path / "full").iterdir()}
    assert left == {DATASET, *(shard_path(tmp_path, n).name for n in range(at))}
    with pytest.raises(InputError, match="not finished"):
        DataSet(tmp_path / "full")
    preprocess(model, bad_clips, tmp_path / "full", **SETTINGS)
    same_files(tmp_path / "full", tmp_path / "whole")
    more = preprocess(model, bad_clips, tmp_path / "more", **SETTINGS, upscale=True, uncaptioned=True)
    assert more.rejected and {r["key"] for r in more.rejected} == REASONS.keys() - {
        "tiny.mp4",
        "silent.mp4",
        "untold.mp4",
    }


def test_killed_at_any_moment(model: Path, clips: Path, tmp_path: Path) -> None:
    """Children that kill themselves: with a shard half written, written but not named, all but the index done, and
    after each shard."""
    preprocess(model, clips, tmp_path / "whole", **SETTINGS)
    out = tmp_path / "out"

    def half(path: Path, rows: Any, *_: Any) -> None:
        path.with_name(f".{path.name}.part").write_bytes(b"PAR1")
        next(iter(rows))
        die()

    def child(target: Any, name: str, action: Callable[..., Any], on_count: Callable[[int, int], None]) -> None:
        """A process that makes the data set, with one function exchanged."""
        pid = os.fork()
        if not pid:
            setattr(target, name, action)
            preprocess(model, clips, out, **SETTINGS, on_count=on_count)
            os._exit(3)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert not (out / INDEX).exists()

    def after_one(done: int, _: int) -> None:
        if done:
            die()

    child(job, "write_shard", half, print)
    child(os, "fsync", die, print)
    child(job, "__doc__", print, after_one)
    child(os, "fsync", die, print)
    child(job, "write_index", die, print)
    assert {f.name for f in out.iterdir()} == {DATASET, "part-00000.parquet", "part-00001.parquet"}
    seen: list[tuple[int, int]] = []
    preprocess(model, clips, out, **SETTINGS, on_count=lambda *count: seen.append(count))
    assert seen == [(4, 4)], "nothing is encoded twice"
    same_files(out, tmp_path / "whole")


def test_another_job_is_refused(model: Path, clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    preprocess(model, clips, out, **SETTINGS)
    before = {f: f.read_bytes() for f in out.iterdir()}
    for changed, said in (({"fps": 6.0}, "fps"), ({"shard": 3}, "shard"), ({"stored": "float16"}, "dtype")):
        with pytest.raises(ConfigError, match=f"made with another {said}"):
            preprocess(model, clips, out, **{**SETTINGS, **changed})
    other = tmp_path / "clips"
    shutil.copytree(clips, other)
    (other / "a.txt").write_text("a cat")
    with pytest.raises(ConfigError, match="another source digest"):
        preprocess(model, other, out, **SETTINGS)
    manifest = Manifest.read(out)
    with claimed(out, manifest), pytest.raises(ConfigError, match="another process is making"):
        preprocess(model, clips, out, **SETTINGS)
    assert {f: f.read_bytes() for f in out.iterdir()} == before
    for settings, said in (({"sizes": [(30, 32)]}, "height=30"), ({"frames": [6]}, "num_frames=6")):
        with pytest.raises(InputError, match=said):
            preprocess(model, clips, tmp_path / "new", **{**SETTINGS, **settings})
    with pytest.raises(ConfigError, match="stored='int8'"):
        preprocess(model, clips, tmp_path / "new", **SETTINGS, stored="int8")
    assert not (tmp_path / "new").exists()


def test_damaged_data_sets(model: Path, clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    preprocess(model, clips, out, **SETTINGS)
    shard = shard_path(out, 1)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(InputError, match=r"part-00001.parquet cannot be read .*delete it and run"):
        rows_of(out)
    shard.unlink()
    preprocess(model, clips, out, **SETTINGS)
    assert shard.read_bytes() == whole
    (out / DATASET).write_text((out / DATASET).read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(InputError, match="version 2"):
        DataSet(out)
    (out / DATASET).unlink()
    with pytest.raises(InputError, match="does not exist"):
        DataSet(out)
    with pytest.raises(ConfigError, match=r"without its dataset.json"):
        preprocess(model, clips, out, **SETTINGS)


def test_the_command(model: Path, bad_clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--size", "32x32", "--size", "32x64", "--frames", "5", "--frames", "9", "--shard", "2", "--fps", "12"]
    command = ["preprocess", str(model), str(bad_clips), str(tmp_path / "out"), *given, "--device", "cpu"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "4 rows of 12 clips, 8 rejected" in said and "1 x its caption is empty" in said and "rejected.jsonl" in said
    made: Summary = preprocess(model, bad_clips, tmp_path / "api", **SETTINGS)
    assert made.rows == 4
    same_files(tmp_path / "out", tmp_path / "api")
    assert main([*command[:-2], "--aspects", "1:1,16:9"]) == 1
    assert "made with another sizes" in capsys.readouterr().err


@pytest.mark.distributed
def test_several_processes_give_what_one_gives(model: Path, bad_clips: Path, tmp_path: Path) -> None:
    preprocess(model, bad_clips, tmp_path / "one", **SETTINGS, threads=1)
    preprocess(model, bad_clips, tmp_path / "two", **SETTINGS, threads=1, workers=2)
    same_files(tmp_path / "one", tmp_path / "two")


@pytest.mark.distributed
def test_a_killed_job_takes_its_processes_along(model: Path, clips: Path, tmp_path: Path) -> None:
    """They would write beside those of the next job."""
    out, settings = tmp_path / "out", {**SETTINGS, "shard": 1, "threads": 1}
    preprocess(model, clips, tmp_path / "whole", **settings)
    given = "--size 32x32 --size 32x64 --frames 5 --frames 9 --fps 12 --shard 1 --threads 1 --workers 2 --device cpu"
    command = [sys.executable, "-m", "kinetoscope", "preprocess", str(model), str(clips), str(out), *given.split()]
    process = subprocess.Popen(command)
    wait_for(lambda: any(out.glob("part-*.parquet")) or process.poll() is not None)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    process.kill()
    process.wait()
    wait_for(lambda: not any(alive(child) for child in children))
    preprocess(model, clips, out, **settings)
    same_files(out, tmp_path / "whole")


def alive(pid: str) -> bool:
    """Whether a process is there and has not ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not happen in ten minutes")
