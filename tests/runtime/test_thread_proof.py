"""The proof for threads: many runs of two generators in two threads, some of which fail or are cancelled."""

from __future__ import annotations

import gc
import tempfile
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kinetoscope import VideoGenerator
from kinetoscope.core.context import current_context
from kinetoscope.core.errors import BatchError
from kinetoscope.engine.hooks import Hook
from kinetoscope.nn.lora import carrier_of
from lora_files import factors, tensors, write
from runtime.test_threads import PROMPTS, SIZE
from threads import in_threads
from tiny import make_tiny_wan

KINDS = ("video", "failing", "cancelled", "list", "interrupted")
"""What the runs of a thread are, in turns; every list holds a prompt that fails."""


class Watch(Hook):
    """Counts the runs that are open, and fails in the runs that make one prompt."""

    name = "watch"

    def __init__(self) -> None:
        self.open = self.started = 0
        self._lock = threading.Lock()

    def on_run_start(self, state: Any) -> None:
        with self._lock:
            self.open += 1
            self.started += 1

    def on_step_start(self, state: Any, step: Any) -> None:
        if "black" in state.batch.prompts and step.index == 1:
            raise ValueError("this run fails")

    def on_run_end(self, state: Any, error: BaseException | None) -> None:
        with self._lock:
            self.open -= 1


def one(generator: VideoGenerator, watch: Watch, number: int, folder: Path | None) -> list[Any]:
    """Return the videos of run `number` of a thread."""
    prompt, seed = PROMPTS[number % len(PROMPTS)], number
    kind = KINDS[number % len(KINDS)]
    fields: dict[str, Any] = {**SIZE, "hooks": [watch], "fps": 8}
    if kind == "failing":
        with pytest.raises(ValueError, match="this run fails"):
            generator.generate_video("black", seed=seed, **fields)
        return []
    if kind == "cancelled":
        events = generator.iterate(prompt, seed=seed, **fields)
        for event in events:
            if event.kind == "step" and event.step.index == number % 3:
                break
        events.close()
        return []
    if kind == "interrupted":

        def interrupt(event: Any) -> None:
            if event.kind == "step":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            generator.generate_video(prompt, seed=seed, on_event=interrupt, **fields)
        return []
    output = None if folder is None else folder / f"{number}.mp4"
    if kind == "video":
        return [generator.generate_video(prompt, seed=seed, output_path=output, **fields)]
    with pytest.raises(BatchError) as caught:
        generator.generate_video([prompt, "black", "a cat"], seed=seed, batch_size=3, **fields)
    return [caught.value.results[0], caught.value.results[2]]


def many(generator: VideoGenerator, watch: Watch, first: int, count: int, folder: Path | None = None) -> list[Any]:
    """Return the videos of `count` runs, numbered from `first`."""
    return [video for i in range(count) for video in one(generator, watch, first + i, folder)]


@pytest.mark.parametrize("runs", [5, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("cache", [None, "fbcache:threshold=0.5"])
def test_runs_of_two_threads_are_their_serial_runs_and_leave_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: int, cache: str | None
) -> None:
    """Each thread uses both generators, which have LoRAs of their own; one has a step cache in the second case."""
    path = make_tiny_wan(tmp_path / "model")
    lora = write(tmp_path / "style.safetensors", tensors("diffusers", factors()))
    generators = [
        VideoGenerator.from_pretrained(path, "cpu", cache=cache),
        VideoGenerator.from_pretrained(path, "cpu", lora=str(lora)),
    ]
    watch = Watch()
    expected = [many(g, watch, first, runs) for first in (0, 1000) for g in generators]
    started = watch.started
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    output = tmp_path / "videos"

    def both(first: int) -> list[list[Any]]:
        order = generators if first == 0 else generators[::-1]
        made = [many(g, watch, first, runs, output / f"{first}-{generators.index(g)}") for g in order]
        return made if first == 0 else made[::-1]

    got = [videos for both_of in in_threads([partial(both, 0), partial(both, 1000)], limit=900) for videos in both_of]
    for mine, theirs in zip(got, expected, strict=True):
        assert len(mine) == len(theirs) and mine
        for video, alone in zip(mine, theirs, strict=True):
            assert torch.equal(video.latents, alone.latents) and (video.frames == alone.frames).all()
            assert video.record["frames_sha256"] == alone.record["frames_sha256"]
    assert watch.open == 0 and watch.started == 2 * started, "every run that began has ended"
    for generator in generators:
        assert generator._loras.held == 0
        for module in generator.pipeline.loaded_modules().values():
            if isinstance(module, nn.Module):
                assert not carrier_of(module).held
    assert current_context() is None and not list(temporary.iterdir())
    written = [p for p in output.rglob("*") if p.is_file()]
    assert len(written) == sum(v.path is not None for videos in got for v in videos)
    assert all(p.suffix == ".mp4" and not p.name.startswith(".") for p in written), "no part of a file is left"
    gc.collect()
    assert not [t for t in threading.enumerate() if t.name.startswith("kinetoscope")]
