"""Caches that several trainings share: one process makes a file, others wait for it and read it whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kinetoscope.core.errors import ConfigError
from kinetoscope.core.file_lock import file_lock
from kinetoscope.train.data import ode_pairs, played
from kinetoscope.train.data.ode_pairs import OdePairsData, is_prepared, prepare
from kinetoscope.train.data.played import PlayedData, PlayedSource
from kinetoscope.train.flow import BATCH, prepare_latents
from kinetoscope.train.recipe import WorldSection
from kinetoscope.train.vae import Clips
from train.processes import in_two_processes

CLIPS = Clips(WorldSection(name="shapes", height=16, width=16, num_frames=1))
COUNT = BATCH + 3


class Brightness:
    """Latents [B, 1, 1, 2, 2] of the brightness of quarters; it notes each call in a file."""

    def __init__(self, calls: Path, overlap: Callable[[], None] = lambda: None) -> None:
        self.calls, self.overlap = calls, overlap

    def latents(self, video: Tensor) -> Tensor:
        self.overlap()
        with self.calls.open("a") as file:
            file.write("call\n")
        return torch.nn.functional.adaptive_avg_pool3d(video.mean(1, keepdim=True), (1, 2, 2))


def test_latents_are_made_once_when_two_processes_want_them(tmp_path: Path) -> None:
    calls, alone = tmp_path / "calls", tmp_path / "alone"
    expected = prepare_latents(lambda: Brightness(alone), CLIPS, COUNT, tmp_path / "expected.npy")

    def work(overlap: Callable[[], None]) -> None:
        found = prepare_latents(lambda: Brightness(calls, overlap), CLIPS, COUNT, tmp_path / "shared.npy")
        assert np.array_equal(found, expected)

    in_two_processes(work, "making latents")
    assert calls.read_text() == alone.read_text() == "call\n" * 2
    assert not list(tmp_path.glob("*.part*")) and not list(tmp_path.glob("*.count"))


@pytest.mark.parametrize("count", ["", "many", "-3", "999999"])
def test_latents_are_made_anew_when_the_count_of_an_interrupted_start_is_damaged(tmp_path: Path, count: str) -> None:
    expected = prepare_latents(lambda: Brightness(tmp_path / "a"), CLIPS, COUNT, tmp_path / "expected.npy")
    np.save(tmp_path / "latents.part.npy", np.zeros((COUNT, 1, 1, 2, 2), np.float16))
    (tmp_path / "latents.count").write_text(count)
    found = prepare_latents(lambda: Brightness(tmp_path / "b"), CLIPS, COUNT, tmp_path / "latents.npy")
    assert np.array_equal(found, expected)


def test_damaged_latents_are_named(tmp_path: Path) -> None:
    (tmp_path / "latents.npy").write_bytes(b"no array")
    with pytest.raises(ConfigError, match=r"latents .*latents\.npy cannot be read .*delete the file"):
        prepare_latents(lambda: Brightness(tmp_path / "a"), CLIPS, COUNT, tmp_path / "latents.npy")


def test_trajectories_are_made_once_when_two_processes_want_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = tmp_path / "calls"
    section = OdePairsData(folder=str(tmp_path / "pairs"), teacher="tiny-t2v", prompts="shapes", count=40)
    states = torch.arange(32.0).view(32, 1, 1, 1, 1, 1).to(torch.float16)

    def work(overlap: Callable[[], None]) -> None:
        def make(*_: Any) -> tuple[Tensor, tuple[float, ...]]:
            overlap()
            with calls.open("a") as file:
                file.write("shard\n")
            return states, (1.0,)

        monkeypatch.setattr(ode_pairs, "_make", make)
        teacher: Any = None
        assert prepare(section, teacher) == (1.0,)
        assert is_prepared(section)

    in_two_processes(work, "making trajectories")
    assert calls.read_text() == "shard\n" * 2


def test_trajectories_of_replaced_prompts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    section = OdePairsData(folder=str(tmp_path / "pairs"), teacher="tiny-t2v", prompts=str(prompts), count=2)
    states: Any = torch.zeros(32, 1, 1, 1, 1, 1, dtype=torch.float16)
    monkeypatch.setattr(ode_pairs, "_make", lambda *_: (states, (1.0,)))
    teacher: Any = None
    prepare(section, teacher)
    assert is_prepared(section)
    prompts.write_text("a red circle\na green square\n")
    with pytest.raises(ConfigError, match="holds trajectories with another prompts' texts"):
        is_prepared(section)


def test_played_clips_are_made_once_when_two_processes_want_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, calls = tmp_path / "clips", tmp_path / "calls"
    settings = PlayedData(
        source="played", world=WorldSection(name="maze", height=32, width=32, num_frames=5), clips=2, latents="basis"
    )
    module = torch.nn.Module()
    module.encoder = module.quant_conv = torch.nn.Identity()
    pipeline = type("Pipeline", (), {"get_module": lambda self, name: module})()
    opened = type("Opened", (), {"encoder": lambda self: None, "pipeline": pipeline})()
    context: Any = type("Context", (), {"opened": opened})()
    monkeypatch.setattr(played, "latent_size", lambda *_: (2, 4, 4))
    monkeypatch.setattr(played, "kept_under", lambda *_, **__: path)

    def work(overlap: Callable[[], None]) -> None:
        def make(*_: Any) -> dict[str, np.ndarray]:
            overlap()
            with calls.open("a") as file:
                file.write("call\n")
            return {"latents": np.ones((2, 1))}

        monkeypatch.setattr(PlayedSource, "_make", make)
        assert PlayedSource(settings, context).arrays["latents"].sum() == 2

    in_two_processes(work, "making clips")
    assert calls.read_text() == "call\n"


def test_a_lock_is_told_busy_and_free_again_when_its_holder_ends(tmp_path: Path) -> None:
    busy = ConfigError("busy")
    with file_lock(tmp_path / "thing", busy=busy):
        with pytest.raises(ConfigError, match="busy"), file_lock(tmp_path / "thing", busy=busy):
            pass
        with file_lock(tmp_path / "other", busy=busy):
            pass
    with file_lock(tmp_path / "thing", busy=busy):
        pass
