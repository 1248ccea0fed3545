"""Data sets: rows against the pipeline's own stages, every source alike. What goes wrong: test_data_faults.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from kinetoscope.core.types import ExecutionArgs
from kinetoscope.loading import resolve_model
from kinetoscope.media import fit_picture, load_clip, write_video
from kinetoscope.pipelines.presets import build_pipeline
from kinetoscope.pipelines.stages.images import encode_video
from kinetoscope.pipelines.stages.text import TextEncodingStage
from kinetoscope.train.data.clips import read_pictures
from kinetoscope.train.data.preprocess import preprocess
from kinetoscope.train.data.sources import Item, Place
from kinetoscope.train.data.table import DATASET
from kinetoscope.worlds import get_world
from train.data_sets import CAPTIONS, SETTINGS, SHAPES, as_csv, as_jsonl, as_tars, film, rows_of, same_rows

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


def test_odd_sizes(tmp_path: Path) -> None:
    """Which some codecs have, and Wan's VAE has not."""
    frames = np.random.default_rng(0).integers(0, 256, (3, 45, 37, 3), np.uint8)
    with av.open(tmp_path / "odd.mkv", "w") as file:
        stream = file.add_stream("ffv1", rate=12, options={"strict": "-2"})
        stream.width, stream.height, stream.pix_fmt = 37, 45, "bgr0"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        file.mux(stream.encode())
    _, pictures = read_pictures(Item("odd.mkv", Place(str(tmp_path / "odd.mkv"))), 12.0)
    assert np.array_equal(np.stack(pictures), frames)


# -- sources ----------------------------------------------------------------------------------------------------------


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
