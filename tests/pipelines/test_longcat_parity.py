"""LongCat-Video against recorded runs of the published pipeline, from the same files (fixtures/longcat/make.py)."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kinetoscope import VideoGenerator
from kinetoscope.core.errors import InputError, KinetoscopeError
from kinetoscope.core.types import ExecutionArgs, ForwardBatch, SamplingParams
from kinetoscope.diffusion.guidance import Guidance
from kinetoscope.engine.engine import DenoisingEngine
from kinetoscope.engine.strategies.longcat import LongCatInputs, LongCatStrategy, start_schedule
from kinetoscope.loading import resolve_model
from kinetoscope.media import read_video, write_video
from kinetoscope.models.longcat import spec
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.pipelines.presets import build_pipeline
from kinetoscope.runtime.replay import replay
from models.tiny_longcat import (
    FIXTURES,
    MODEL,
    NEGATIVE,
    PROMPT,
    REFINED,
    RUNS,
    SEED,
    SIZE,
    STAGE1,
    moving_picture,
)

TOLERANCE = 1e-4  # of the latents' standard deviation


@pytest.fixture(scope="module")
def whole() -> ComposedPipeline:
    return build_pipeline(resolve_model(MODEL), ExecutionArgs())


@pytest.fixture(scope="module")
def pipeline(whole: ComposedPipeline) -> ComposedPipeline:
    """Up to the latents; decoding takes most of the time of so small a model."""
    names = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    shared = build_pipeline(whole.model, whole.args, modules={name: whole.get_module(name) for name in names})
    del shared.stages["decoding"]
    return shared


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(FIXTURES / "runs.safetensors")


def pictures(frames: int, size: tuple[int, int]) -> Tensor:
    """[1, 3, T, H, W] in [-1, 1]"""
    return torch.from_numpy(moving_picture(frames, *size)).permute(3, 0, 1, 2)[None] / 127.5 - 1


def request(pipeline: ComposedPipeline, task: str, arguments: dict[str, Any], samples: int = 1) -> ForwardBatch:
    """The batch of a recorded run."""
    arguments = dict(arguments)
    size = REFINED if task == "refine" else SIZE
    fields = {k: arguments.pop(k) for k in list(arguments) if k in SamplingParams.__dataclass_fields__}
    kind = {"i2v": "image", "vc": "video"}.get(task) or arguments.pop("condition", None)
    if task == "refine":
        arguments.setdefault("stage1_video", moving_picture(*STAGE1))
    params = SamplingParams(height=size[0], width=size[1], **fields, extra=arguments).over(pipeline.defaults())
    seeds = [SEED + i for i in range(samples)]
    batch = ForwardBatch(params, [PROMPT] * samples, [NEGATIVE] * samples, seeds)
    if kind == "image":
        batch.image = pictures(1, size)[:, :, 0].expand(samples, -1, -1, -1)
    if kind == "video":
        batch.video = pictures(7, size).expand(samples, -1, -1, -1, -1)
    return batch


def run(pipeline: ComposedPipeline, name: str, **changes: Any) -> ForwardBatch:
    task, arguments = RUNS[name]
    return pipeline.run(request(pipeline, task, {**arguments, **changes}))


def latents(batch: ForwardBatch) -> Tensor:
    assert batch.latents is not None
    return batch.latents


def error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return ((got - expected).abs().max() / expected.std()).item()


@pytest.mark.parametrize("name", RUNS)
def test_latents(pipeline: ComposedPipeline, recorded: dict[str, Tensor], name: str, record_property: Any) -> None:
    found = error(latents(run(pipeline, name)), recorded[name])
    record_property("relative_error", found)
    assert found <= TOLERANCE


def test_frames(whole: ComposedPipeline, recorded: dict[str, Tensor]) -> None:
    frames = run(whole, "t2v").frames[0]
    expected = recorded["t2v.frames"][0].numpy()
    assert frames.shape == expected.shape
    assert np.abs(frames.astype(int) - expected).max() <= 1


def test_opened_by_path(recorded: dict[str, Tensor]) -> None:
    generator = VideoGenerator.from_pretrained(MODEL, device="cpu", dtype="float32")
    arguments = RUNS["t2v"][1]
    result = generator.generate_video(PROMPT, NEGATIVE, *SIZE, seed=SEED, **arguments)
    assert error(result.latents[None], recorded["t2v"]) <= TOLERANCE


@pytest.mark.parametrize(("name", "frames"), [("refine_spatial", 5), ("refine_i2v", 10)])
def test_refined_frames_are_without_padding(whole: ComposedPipeline, name: str, frames: int) -> None:
    assert run(whole, name).frames[0].shape == (frames, *REFINED, 3)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("name", ["i2v", "vc_g4", "refine_vc"])
def test_cache_changes_nothing(pipeline: ComposedPipeline, name: str, guidance: float) -> None:
    """At any guidance, once the CFG-Zero* scale is taken over the same frames."""
    common = {"guidance_scale": guidance, "scale_over_noise_frames": True}
    with_cache = latents(run(pipeline, name, **common, use_kv_cache=True))
    without = latents(run(pipeline, name, **common, use_kv_cache=False))
    assert error(with_cache, without) <= TOLERANCE


def test_as_published_the_scale_depends_on_the_cache(recorded: dict[str, Tensor]) -> None:
    """The published paths agree at guidance 1 only, so each was worth recording."""
    assert error(recorded["vc_cache_g1"], recorded["vc_g1"]) <= TOLERANCE
    assert error(recorded["vc_cache_g4"], recorded["vc_g4"]) > 10 * TOLERANCE


@pytest.mark.parametrize("name", ["i2v", "vc_cache_g4", "vc_g4", "refine_vc"])
def test_condition_latents_never_change(pipeline: ComposedPipeline, name: str) -> None:
    batch = run(pipeline, name)
    assert batch.condition is not None
    frames = batch.condition.shape[2]
    assert torch.equal(latents(batch)[:, :, :frames], batch.condition)


def test_condition_latents_never_change_on_the_way(pipeline: ComposedPipeline) -> None:
    batch = request(pipeline, *RUNS["vc_g4"])
    seen = [e.latents[:, :, :2].clone() for e in pipeline.iterate(batch) if getattr(e, "latents", None) is not None]
    assert len(seen) > 5 and batch.condition is not None
    assert all(torch.equal(s, batch.condition) for s in seen)


@pytest.mark.parametrize("name", ["i2v", "vc_cache_g4"])
def test_plans_and_batches_agree(pipeline: ComposedPipeline, name: str) -> None:
    """Sequential rows, batched rows and two samples at once, the first of which is the recorded one."""
    task, arguments = RUNS[name]
    alone = [latents(pipeline.run(_seeded(request(pipeline, task, arguments), SEED + i))) for i in range(2)]
    before = pipeline.args
    try:
        for plan in ("sequential", "batched"):
            pipeline.args = replace(before, cfg=plan)
            both = latents(pipeline.run(request(pipeline, task, arguments, samples=2)))
            assert error(both, torch.cat(alone)) <= TOLERANCE
    finally:
        pipeline.args = before


def _seeded(batch: ForwardBatch, seed: int) -> ForwardBatch:
    batch.seeds = [seed]
    return batch


def test_two_runs_interleaved(pipeline: ComposedPipeline, recorded: dict[str, Tensor]) -> None:
    batches = {name: request(pipeline, *RUNS[name]) for name in ("vc_cache_g4", "i2v")}
    runs = {name: pipeline.iterate(batch) for name, batch in batches.items()}
    while runs:
        for name in list(runs):
            try:
                next(runs[name])
            except StopIteration:
                del runs[name]
    for name, batch in batches.items():
        assert torch.equal(latents(batch), latents(run(pipeline, name)))
        assert error(latents(batch), recorded[name]) <= TOLERANCE


def test_caches_are_values_of_the_run(pipeline: ComposedPipeline) -> None:
    """One in the state, a pair a block, for all branches alike (it knows no text); the modules keep nothing."""
    transformer = pipeline.get_module("transformer")
    before = {name: set(vars(module)) for name, module in transformer.named_modules()}
    batch = request(pipeline, *RUNS["vc_cache_g4"])
    for name in ("request", "text_encoding", "latents"):
        batch = pipeline.stages[name].forward(batch, pipeline.args)
    strategy: Any = LongCatStrategy(pipeline.stages["denoising"])  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        state = strategy.prepare(batch, pipeline.args)
        for _ in DenoisingEngine(strategy).iterate(state):
            pass
    assert [len(pair) for pair in state.tables["kv_cache"]] == [2] * len(transformer.blocks)
    assert {name: set(vars(module)) for name, module in transformer.named_modules()} == before


def test_offloaded_cache_is_the_same(pipeline: ComposedPipeline) -> None:
    assert torch.equal(
        latents(run(pipeline, "vc_cache_g4", offload_kv_cache=True)), latents(run(pipeline, "vc_cache_g4"))
    )


def test_plain_guidance_would_be_seen(
    pipeline: ComposedPipeline, recorded: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tolerance tells CFG-Zero* from plain guidance."""
    from kinetoscope.engine.strategies import longcat

    monkeypatch.setattr(longcat, "cfg_zero_scale", lambda cond, uncond: 1.0)
    assert error(latents(run(pipeline, "t2v")), recorded["t2v"]) > 10 * TOLERANCE
    assert Guidance(4.0).branches == ("uncond", "cond")


def test_schedules(pipeline: ComposedPipeline) -> None:
    """Noise levels by their definition."""
    prototype = pipeline.get_module("scheduler")
    params = SamplingParams(num_inference_steps=4, flow_shift=1.0)

    def levels(inputs: LongCatInputs) -> list[float]:
        schedule = start_schedule(prototype, params, inputs)
        assert schedule.times == pytest.approx([1000 * s for s in schedule.sigmas[:-1]], rel=1e-6)
        return schedule.sigmas

    plain = [1.0, 0.667, 0.334, 0.001, 0.0]
    assert levels(LongCatInputs()) == pytest.approx(plain)
    assert levels(LongCatInputs(use_distill=True)) == pytest.approx([1.0, 0.76, 0.5, 0.26, 0.0])
    tail = [0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05, 0.0]
    assert levels(LongCatInputs(enhance_hf=True)) == pytest.approx([1.0, 0.667, *tail])
    assert levels(LongCatInputs(t_thresh=0.5)) == pytest.approx([0.5, 0.334, 0.001, 0.0])


def test_defaults_of_the_published_model(pipeline: ComposedPipeline) -> None:
    """Defaults of the published pipeline's methods (480p, 93 frames, 50 steps, guidance 4); 15 frames a second."""
    table = {"height": 480, "width": 832, "num_frames": 93, "fps": 15.0, "num_inference_steps": 50}
    table |= {"guidance_scale": 4.0, "flow_shift": None, "scheduler": None}
    preset = spec.PRESETS["meituan-longcat/LongCat-Video"]
    assert {name: getattr(preset, name) for name in table} == table
    assert preset.negative_prompt == spec.NEGATIVE_PROMPT
    extra = pipeline.defaults().extra
    assert extra is not None and extra["t_thresh"] == 0.5 and extra["use_distill"] is False


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("vc_g4", {"num_cond_frames": 9}, "num_cond_frames"),  # of 7 given
        ("vc_g4", {"num_cond_frames": 4}, "1 \\+ a multiple"),
        ("vc_g4", {"num_cond_frames": 5, "num_frames": 5}, "below num_frames"),
        ("vc_g4", {"use_distill": True}, "enhance_hf"),
        ("vc_g4", {"use_kv_cache": "yes"}, "use_kv_cache"),
        ("t2v", {"scheduler": "unipc"}, "euler"),
        ("t2v_distill", {"num_inference_steps": 51}, "distilled"),
        ("refine", {"t_thresh": 1.5}, "t_thresh"),
        ("refine", {"num_cond_frames": 5}, "image or a video"),
        ("refine", {"height": 32}, "multiple of 64"),
        ("refine_vc", {"num_cond_frames": 0}, "num_cond_frames"),
        ("refine_vc", {"num_cond_frames": "5"}, "num_cond_frames='5' is not a whole number"),
        ("t2v", {"scale_over_noise_frames": "yes"}, "neither true nor false"),
        ("t2v", {"use_distill": 1}, "neither true nor false"),
        ("t2v", {"num_cond_frames": 5}, "num_cond_frames=5 .* none is given"),
        ("i2v", {"num_cond_frames": 1}, "give video="),
        ("t2v", {"use_kv_cache": True}, "none are given"),
        ("t2v", {"t_thresh": "x"}, "t_thresh='x'"),
    ],
)
def test_bad_requests(pipeline: ComposedPipeline, name: str, changes: dict[str, Any], words: str) -> None:
    task, arguments = RUNS[name]
    batch = request(pipeline, task, arguments)
    fields = {k: v for k, v in changes.items() if k in SamplingParams.__dataclass_fields__}
    extra = {k: v for k, v in changes.items() if k not in fields}
    batch.params = SamplingParams(**fields, extra=extra).over(batch.params)
    with pytest.raises(InputError, match=words):
        pipeline.run(batch)


@pytest.mark.parametrize(
    ("video", "words"),
    [
        (np.zeros((5, 3, 8, 8)), "uint8"),
        (np.zeros((0, 8, 8, 3), np.uint8), "uint8"),
        ([np.zeros((5, 8, 8, 3), np.uint8)] * 2, "2 videos"),
        ("nowhere.mp4", "nowhere.mp4"),
    ],
)
def test_video_to_refine_must_be_frames(pipeline: ComposedPipeline, video: Any, words: str) -> None:
    batch = request(pipeline, *RUNS["refine"])
    batch.params = SamplingParams(extra={"stage1_video": video}).over(batch.params)
    with pytest.raises(KinetoscopeError, match=words):
        pipeline.run(batch)


def test_a_record_names_the_video_to_refine(pipeline: ComposedPipeline) -> None:
    batch = run(pipeline, "refine")
    params = json.loads(json.dumps(asdict(batch.params)))
    assert params["extra"]["stage1_video"].startswith("sha256:")
    assert params["num_frames"] == 2 * STAGE1[0] and params["guidance_scale"] == 1.0


def test_a_refined_video_cannot_be_replayed(tmp_path: Path) -> None:
    """And the file says why: it holds no more than the digest of what was refined."""
    made = VideoGenerator.from_pretrained(MODEL, device="cpu", dtype="float32")
    made.generate_video(
        PROMPT, stage1_video=moving_picture(3, 32, 32), height=64, width=64, num_frames=5, num_inference_steps=2,
        output_path=tmp_path / "a.mp4",
    )  # fmt: skip
    with pytest.raises(InputError, match="made with stage1_video of the request"):
        replay(tmp_path / "a.mp4")


def test_refines_a_file(pipeline: ComposedPipeline, tmp_path: Path) -> None:
    """The frames that a video file holds, as though they were given."""
    write_video(tmp_path / "low.mp4", moving_picture(5, 32, 48), 15)
    stored, _ = read_video(tmp_path / "low.mp4")
    by_path, by_frames = (latents(run(pipeline, "refine", stage1_video=v)) for v in (tmp_path / "low.mp4", stored))
    assert torch.equal(by_path, by_frames)
