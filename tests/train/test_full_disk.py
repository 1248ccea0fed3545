"""A disk that is full in the middle of a file: the earlier file stays whole, and nothing half-written is left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from full_disk import disk_of
from kinetoscope.core.errors import OutputError
from kinetoscope.train.causalize import CausalSection, make_causal
from kinetoscope.train.checkpoint import load_checkpoint, save_checkpoint
from kinetoscope.train.data import ode_pairs
from kinetoscope.train.flow import prepare_latents
from kinetoscope.train.kept import KeptCheckpoints, save_shared
from kinetoscope.train.loop import _keep_log
from kinetoscope.train.lora import LoraLayers, save_lora
from kinetoscope.train.post import LoraSection
from kinetoscope.train.post_run import run_post_recipe
from kinetoscope.train.recipe import WorldSection
from kinetoscope.train.team import Team
from kinetoscope.train.vae import Clips
from train.post_runs import write_recipe

ALONE = Team(torch.device("cpu"))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.suffix != ".lock"
    }


def checkpoint(folder: Path, value: float) -> None:
    save_checkpoint(folder / "a.pt", {"x": torch.full((9000,), value)})


def shared_checkpoint(folder: Path, value: float) -> None:
    save_shared(folder / "step-00000001", {"x": torch.full((9000,), value)}, ALONE)


def lora(folder: Path, value: float) -> None:
    model = nn.Module()
    model.to_q = nn.Linear(600, 600)
    layers = LoraLayers(model, LoraSection(rank=4, targets=("to_q",)), torch.Generator())
    for _, up in layers.pairs().values():
        up.fill_(value)
    save_lora(layers, folder)


def trajectories(folder: Path, value: float) -> None:
    ode_pairs._save(folder / "00000.safetensors", torch.full((9000,), value), {})


def log(folder: Path, value: float) -> None:
    if not folder.exists():
        folder.mkdir()
        (folder / "log.jsonl").write_text('{"step": 1}\n' * 1500)
    else:
        _keep_log(folder / "log.jsonl", 1)


@pytest.mark.parametrize("write", [checkpoint, shared_checkpoint, lora, trajectories, log])
def test_earlier_file_stays_whole_when_the_disk_is_full(write: Callable[[Path, float], None], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write(folder, 1.0)
    before = contents(folder)
    assert before and max(map(len, before.values())) > 8000
    with disk_of(8000), pytest.raises(OutputError, match="cannot be written"):
        write(folder, 2.0)
    assert contents(folder) == before


def test_causal_model_is_whole_or_absent_when_the_disk_is_full(tmp_path: Path) -> None:
    with disk_of(8000), pytest.raises(OutputError, match="causal cannot be written"):
        make_causal("tiny-t2v", CausalSection(), tmp_path / "causal")
    assert not list(tmp_path.iterdir())


def test_latents_continue_when_the_disk_was_full(tmp_path: Path) -> None:
    class Zeros:
        def latents(self, video: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(video), 1, 1, 20, 20)

    clips = Clips(WorldSection(name="shapes", height=16, width=16, num_frames=1))
    path = tmp_path / "latents.npy"
    with disk_of(2000), pytest.raises(OutputError, match=r"latents\.npy cannot be written: File too large"):
        prepare_latents(Zeros, clips, 3, path)
    assert not path.exists()
    assert prepare_latents(Zeros, clips, 3, path).shape == (3, 1, 1, 20, 20)


def test_exported_model_stays_whole_when_the_disk_is_full(model: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model)
    folder = run_post_recipe(recipe, ["loop.steps=1"])
    (folder / "README.md").write_text("a model of an earlier export")
    before = contents(folder.parent)
    with disk_of(8000), pytest.raises(OutputError, match="model cannot be written"):
        run_post_recipe(recipe, ["loop.steps=1"], export_only=True)
    assert contents(folder.parent) == before
    run_post_recipe(recipe, ["loop.steps=1"], export_only=True)
    assert "steps: 1" in (folder / "README.md").read_text()
    assert contents(folder.parent).keys() == before.keys()


def test_checkpoints_of_two_runs_have_the_same_bytes_and_leave_no_temporary_file(tmp_path: Path) -> None:
    state: dict[str, Any] = {"x": torch.arange(9.0), "step": 3}
    for name in ("a", "b"):
        kept = KeptCheckpoints(tmp_path / name, 1, ALONE, dict)
        (tmp_path / name).mkdir()
        for left in ("step-00000009.tmp", ".0123456789ab.part"):  # of a process that was killed
            (tmp_path / name / left).write_bytes(b"torn")
        kept.save(3, state)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a").keys() == {"step-00000003.pt"}
    assert load_checkpoint(tmp_path / "a" / "step-00000003.pt")["step"] == 3
