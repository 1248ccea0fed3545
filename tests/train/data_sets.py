"""Clips in folders, lists and tars, and data sets made of them."""

from __future__ import annotations

import csv
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kinetoscope.media import write_video
from kinetoscope.train.data.table import DataSet

SETTINGS: dict[str, Any] = {"sizes": [(32, 32), (32, 64)], "frames": [5, 9], "fps": 12.0, "shard": 2}
CAPTIONS = {"a": "a red circle", "b/c": "a blue square moving", "d": "a small cat", "e": "a cat on black"}
SHAPES = {"a": (9, 32, 32), "b/c": (6, 48, 80), "d": (12, 32, 32), "e": (9, 40, 40)}
"""Frames, height and width of the good clips."""


def film(path: Path, frames: int, height: int, width: int, seed: int = 0) -> Path:
    """Blocks of random colours."""
    small = np.random.default_rng(seed).integers(0, 256, (frames, height // 8, width // 8, 3), np.uint8)
    return write_video(path, small.repeat(8, 1).repeat(8, 2), 12)


def make_clips(folder: Path) -> Path:
    """The good clips."""
    for seed, (name, caption) in enumerate(CAPTIONS.items()):
        film(folder / f"{name}.mp4", *SHAPES[name], seed)
        (folder / f"{name}.txt").write_text(caption)
    return folder


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


def same_files(a: Path, b: Path) -> None:
    assert {f.name: f.read_bytes() for f in a.iterdir()} == {f.name: f.read_bytes() for f in b.iterdir()}


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
