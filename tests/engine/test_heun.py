"""A solver of two evaluations a step in the engine: each evaluation has its own forward, hooks, rows and guidance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kinetoscope import VideoGenerator
from kinetoscope.core.errors import CompositionError
from kinetoscope.engine.hooks import Hook
from tiny import make_tiny_wan

STEPS = 3
ASKED: dict[str, Any] = {
    "height": 32, "width": 32, "num_frames": 5, "num_inference_steps": STEPS, "guidance_scale": 4.0,
    "scheduler": "heun",
}  # fmt: skip


class Counting(Hook):
    name = "counting"

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, state: Any, step: Any) -> None:
        assert step.guided is not None and step.branches == ("uncond", "cond")
        self.times.append(step.timestep)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def generator(path: Path) -> VideoGenerator:
    return VideoGenerator.from_pretrained(path, device="cpu", dtype="float32")


def test_every_evaluation_has_hooks_guidance_and_a_trace(generator: VideoGenerator) -> None:
    hook, events = Counting(), list[Any]()
    result = generator.generate_video("a", seed=3, hooks=[hook], trace=True, on_event=events.append, **ASKED)
    evaluations = 2 * STEPS - 1
    assert len(hook.times) == evaluations
    assert hook.times[1] == hook.times[2] and hook.times[3] == hook.times[4]  # the end of a step, the start of the next
    steps = [e.step for e in events if e.kind == "step"]
    assert [s.index for s in steps] == list(range(evaluations)) and steps[0].count == evaluations
    trace = result.logging_info["step_trace"]
    assert len(trace) == evaluations and all(t["cosine"] for t in trace)


def test_runs_in_common_forwards_are_those_of_each_alone(generator: VideoGenerator) -> None:
    together = generator.generate_video(["a red circle", "a blue square"], seed=[1, 2], batch_size=2, **ASKED)
    for prompt, seed, got in zip(["a red circle", "a blue square"], [1, 2], together, strict=True):
        alone = generator.generate_video(prompt, seed=seed, **ASKED).latents
        assert (got.latents - alone).abs().max() <= 1e-4 * alone.std()


def test_interleaved_runs_are_those_of_each_alone(generator: VideoGenerator) -> None:
    alone = [generator.generate_video("a", seed=seed, **ASKED).latents for seed in (1, 2)]
    runs = [generator.iterate("a", seed=seed, **ASKED) for seed in (1, 2)]
    done: list[Any] = [None, None]
    while any(d is None for d in done):
        for i, events in enumerate(runs):
            try:
                if done[i] is None:
                    next(events)
            except StopIteration as stop:
                done[i] = stop.value[0].latents
    assert all(torch.equal(a, b) for a, b in zip(done, alone, strict=True))


def test_step_caches_measure_evaluations_or_refuse_the_solver_by_name(path: Path, generator: VideoGenerator) -> None:
    plain = generator.generate_video("a", seed=3, **ASKED).latents
    never = VideoGenerator.from_pretrained(path, device="cpu", dtype="float32", cache="fbcache:threshold=0")
    assert torch.equal(never.generate_video("a", seed=3, **ASKED).latents, plain)
    always = VideoGenerator.from_pretrained(path, device="cpu", dtype="float32", cache="fbcache:threshold=9")
    skipped = always.generate_video("a", seed=3, **ASKED).logging_info["step_cache"]
    assert skipped == {"name": "fbcache", "rows": 2 * (2 * STEPS - 1), "skipped": 2 * (2 * STEPS - 2)}
    counting = VideoGenerator.from_pretrained(path, device="cpu", cache="taylorseer")
    with pytest.raises(CompositionError, match="cache='taylorseer' and scheduler='heun' cannot be used together"):
        counting.generate_video("a", seed=3, **ASKED)
    counting.generate_video("a", seed=3, **{**ASKED, "scheduler": "euler"})
