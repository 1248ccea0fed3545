"""Runs driven together give what each gives alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.fakes import FakeStrategy, RecordingHook, make_batch
from kinetoscope import VideoGenerator
from kinetoscope.core.errors import CompositionError
from kinetoscope.core.types import ExecutionArgs, ForwardBatch
from kinetoscope.engine.batching import BatchedRun, StepBatcher
from kinetoscope.engine.engine import DenoisingEngine
from kinetoscope.engine.hooks import Interceptor, StepTraceHook
from tiny import make_tiny_wan

SIZE: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5, "fps": 8}
REQUESTS: list[dict[str, Any]] = [
    {"prompt": "a red cat", "seed": 1, "num_inference_steps": 4, "guidance_scale": 4.0},
    {"prompt": "a small blue circle moving left on black", "seed": 2, "num_inference_steps": 6, "guidance_scale": 2.5},
    {"prompt": "a", "seed": 3, "num_inference_steps": 3, "guidance_scale": 1.0},
    {"prompt": "a white square", "seed": 4, "num_inference_steps": 6, "guidance": "cfg:reuse=0.5", "guidance_scale": 3},
    {"prompt": "a black square", "seed": 5, "num_inference_steps": 5, "guidance": "apg:momentum=-0.5,norm=5"},
]


@pytest.fixture(scope="module", params=["t2v", "a14b"])
def generator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VideoGenerator:
    return VideoGenerator.from_pretrained(make_tiny_wan(tmp_path_factory.mktemp("wan"), kind=request.param), "cpu")


def prepared(generator: VideoGenerator, fields: dict[str, Any], **args: Any) -> tuple[DenoisingEngine, Any]:
    """An engine and a state, at the door of denoising."""
    from dataclasses import replace

    from kinetoscope.runtime.request import VideoRequest

    fields = {**SIZE, **fields}
    plan = VideoRequest(fields.pop("prompt"), **fields).plan(generator.defaults(), generator.pipeline.geometry)
    batch = ForwardBatch(plan.params, plan.prompts, plan.negative_prompts, plan.seeds, hooks=plan.hooks)
    events = generator.pipeline.iterate(batch, until="denoising")
    while True:
        try:
            next(events)
        except StopIteration as stop:
            batch = stop.value
            break
    stage: Any = generator.pipeline.stages["denoising"]
    engine = stage.engine(batch)
    return engine, engine.strategy.prepare(batch, replace(generator.pipeline.args, **args))


def latents_of(run: BatchedRun) -> torch.Tensor:
    assert run.done and run.error is None
    result = run.engine.strategy.postprocess(run.state).latents
    assert result is not None
    return result


def alone(generator: VideoGenerator, fields: dict[str, Any]) -> torch.Tensor:
    return generator.generate_video(**{**SIZE, **fields}).latents


@torch.no_grad()
def test_runs_of_any_steps_scales_and_kinds_join_and_leave(generator: VideoGenerator) -> None:
    batcher = StepBatcher()
    runs = [batcher.add(*prepared(generator, fields)) for fields in REQUESTS[:3]]
    batcher.step()
    assert batcher.joined == 3, "three runs in one forward"
    runs.append(batcher.add(*prepared(generator, REQUESTS[3])))
    batcher.step()
    assert batcher.joined >= 3  # of two experts, at high noise
    gone = batcher.add(*prepared(generator, {**REQUESTS[0], "seed": 9}))
    runs.append(batcher.add(*prepared(generator, REQUESTS[4])))
    batcher.step()
    batcher.remove(gone)
    for _ in batcher.drain():
        pass
    assert gone.done and not batcher.runs
    for run, fields in zip(runs, REQUESTS, strict=True):
        expected = alone(generator, fields)
        got = latents_of(run)[0]
        assert (got - expected).abs().max() <= 1e-4 * expected.std(), fields


@torch.no_grad()
def test_other_sizes_and_sequential_runs_are_not_joined(generator: VideoGenerator) -> None:
    batcher = StepBatcher()
    batcher.add(*prepared(generator, REQUESTS[0]))
    batcher.add(*prepared(generator, {**REQUESTS[0], "num_frames": 9}))
    batcher.add(*prepared(generator, REQUESTS[1], cfg="sequential"))
    batcher.step()
    assert batcher.joined == 0
    batcher.add(*prepared(generator, {**REQUESTS[1], "num_frames": 9}))
    batcher.step()
    assert batcher.joined == 2


@torch.no_grad()
def test_a_limit_splits_forwards(generator: VideoGenerator) -> None:
    one = 2 * 2 * 4 * 4  # two branches of the latent positions of a video
    batcher = StepBatcher(limit=2 * one)
    for seed in range(5):
        batcher.add(*prepared(generator, {**REQUESTS[0], "seed": seed}))
    batcher.step()
    assert batcher.joined == 4


class Broken(Interceptor):
    name = "broken"

    def around_forward(self, call: Any, state: Any, inputs: Any) -> torch.Tensor:
        if state.active.index == 1:
            raise ValueError("out of luck")
        return call(state, inputs)


@torch.no_grad()
def test_a_run_that_fails_leaves_the_others_alone(generator: VideoGenerator) -> None:
    batcher = StepBatcher()
    good = batcher.add(*prepared(generator, REQUESTS[0]))
    bad = batcher.add(*prepared(generator, {**REQUESTS[1], "hooks": [Broken()]}))
    ended = [run for run, event in batcher.drain() if event.kind == "run_end"]
    assert ended == [good]
    assert bad.done and isinstance(bad.error, ValueError)
    expected = alone(generator, REQUESTS[0])
    assert (latents_of(good)[0] - expected).abs().max() <= 1e-4 * expected.std()


def test_hooks_end_once_when_a_run_is_removed_or_the_drain_is_closed() -> None:
    log: list[Any] = []
    batcher = StepBatcher()
    runs = []
    for name in ("one", "two"):
        engine = DenoisingEngine(FakeStrategy([]), [RecordingHook(log, name, 1)])
        runs.append(batcher.add(engine, engine.strategy.prepare(make_batch(), ExecutionArgs())))
    with pytest.raises(CompositionError, match="already"):
        batcher.add(runs[0].engine, runs[0].state)
    drain = batcher.drain()
    next(drain)
    batcher.remove(runs[0])
    ends = [entry for entry in log if "run_end" in str(entry)]
    assert len(ends) == 1
    drain.close()
    assert len([entry for entry in log if "run_end" in str(entry)]) == 2


def test_a_list_of_prompts_shares_forwards_and_says_so(generator: VideoGenerator) -> None:
    prompts = ["a red cat", "a small blue circle moving left on black", "a"]
    fields = {**SIZE, "num_inference_steps": 3, "guidance": "cfg:cosine=0.5"}
    results = generator.generate_video(prompts, seed=[1, 2, 3], trace=True, **fields)
    for prompt, seed, result in zip(prompts, (1, 2, 3), results, strict=True):
        expected = generator.generate_video(prompt, seed=seed, trace=True, **fields)
        assert (result.latents - expected.latents).abs().max() <= 1e-4 * expected.latents.std()
        mine, theirs = result.logging_info["step_trace"], expected.logging_info["step_trace"]
        assert [r["rows"] for r in mine] == [r["rows"] for r in theirs]
        assert "one forward with 2 other" in mine[0]["why"] and "other" not in theirs[0]["why"]


def test_the_trace_hook_watches_every_run_by_itself(generator: VideoGenerator) -> None:
    results = generator.generate_video(
        ["a cat", "a red cat"], hooks=[StepTraceHook()], **{**SIZE, "num_inference_steps": 2}
    )
    norms = [r.logging_info["step_trace"][0]["cond_norm"] for r in results]
    assert len(norms[0]) == 1 and norms[0] != norms[1]
