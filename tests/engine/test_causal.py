"""Block-wise rollouts: against the published code, against full recomputation, and as streams."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kinetoscope.core.errors import InputError
from kinetoscope.core.types import ExecutionArgs, ForwardBatch, SamplingParams
from kinetoscope.diffusion.few_step import FewStepSchedule
from kinetoscope.diffusion.guidance import Guidance
from kinetoscope.diffusion.noise import NoiseSource
from kinetoscope.engine.engine import DenoisingEngine
from kinetoscope.engine.protocols import Event
from kinetoscope.engine.strategies.causal import CausalStrategy, LatentBlock, LatentVideo
from models.tiny_causal_wan import (
    BOUNDARY,
    EXPERTS,
    FIXTURES,
    SEEDS,
    SELF_FORCING,
    SIZE,
    TWO_EXPERTS,
    Run,
    first_frame,
    fixture_model,
    frame_mask,
    masked_forward,
    prompt_embeds,
)

TOLERANCE = 1e-5
T2V = SELF_FORCING["t2v"]
ROLLING = Run(12, {"local_attn_size": 5, "sink_size": 1}, {"context_noise": 30})


def make_engine(run: Run, experts: int = 1) -> DenoisingEngine:
    models: list[Any] = [fixture_model(name, **run.config) for name in EXPERTS[:experts]]
    parts: Any = SimpleNamespace(
        transformer=models[0], transformer_2=models[1] if experts > 1 else None, boundary=BOUNDARY
    )
    return DenoisingEngine(CausalStrategy(parts))


def make_batch(run: Run, frames: int | None = None, seeds: list[int] = SEEDS, **params: Any) -> ForwardBatch:
    size = len(seeds)
    values = {"guidance_scale": 1.0, "flow_shift": run.shift, "extra": run.options, **params}
    batch = ForwardBatch(SamplingParams(**values), ["p"] * size, [""] * size, seeds)
    batch.noise = NoiseSource(seeds)
    batch.prompt_embeds = prompt_embeds()[:size]
    batch.negative_embeds = prompt_embeds().flip(1)[:size]
    batch.family = LatentVideo(*(SIZE[0], SIZE[1], SIZE[2]), frames)
    if run.given:
        batch.condition = first_frame()[:size]
    return batch


def offline(engine: DenoisingEngine, batch: ForwardBatch, cfg: str = "auto") -> Tensor:
    with torch.no_grad():
        latents = engine.run_blocks(batch, ExecutionArgs(cfg=cfg)).latents
    assert latents is not None
    return latents


# -- the published code -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SELF_FORCING)
def test_equals_self_forcing(name: str) -> None:
    run = SELF_FORCING[name]
    expected = load_file(FIXTURES / "runs.safetensors")[name]
    got = offline(make_engine(run), make_batch(run, run.frames))
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-4 * expected.std(), float((got - expected).abs().max())


@pytest.mark.parametrize("name", TWO_EXPERTS)
def test_equals_fastvideo_with_two_experts(name: str) -> None:
    """The first frame is a block of its own, and frames that do not fill the last block are left out."""
    run = TWO_EXPERTS[name]
    expected = load_file(FIXTURES / "runs.safetensors")[name]
    got = offline(make_engine(run, experts=2), make_batch(run, run.frames))
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-4 * expected.std(), float((got - expected).abs().max())


def test_the_models_are_far_from_trivial() -> None:
    """A wrong expert, a missing cache or another window would be seen."""
    found = load_file(FIXTURES / "runs.safetensors")
    high, low = (found[name] for name in ("two_experts", "two_experts_i2v"))
    assert (high[:, :, 1:] - low[:, :, 1:]).abs().max() > 1e-2, "the given frame matters"
    run = SELF_FORCING["window"]
    wide = offline(make_engine(Run(run.frames)), make_batch(Run(run.frames), run.frames))
    assert (wide - found["window"]).abs().max() > 1e-2, "the window matters"
    run = Run(9, {}, TWO_EXPERTS["two_experts"].extra, 12.0)
    swapped = make_engine(run, 2)
    parts = swapped.strategy.parts  # pyright: ignore[reportAttributeAccessIssue]
    parts.transformer, parts.transformer_2 = parts.transformer_2, parts.transformer
    assert (offline(swapped, make_batch(run, 9)) - high).abs().max() > 1e-2, "the experts differ"


# -- full recomputation -----------------------------------------------------------------------------------------------


def recompute(run: Run, batch: ForwardBatch, blocks: list[int], guidance: Guidance) -> Tensor:
    """The rollout without a cache: every prediction is one forward of all frames so far behind an explicit mask."""
    model = fixture_model("high", **run.config)
    options = run.options
    schedule = FewStepSchedule.make(options["dmd_denoising_steps"], run.shift, warp=options["warp_denoising_step"])
    texts = {"cond": batch.prompt_embeds, "uncond": batch.negative_embeds}
    window, sink = model.config.local_attn_size, model.config.sink_size
    assert batch.noise is not None
    done = torch.empty(batch.size, SIZE[0], 0, *SIZE[1:])
    for index, size in enumerate(blocks):
        past = torch.full((batch.size, done.shape[2]), float(options["context_noise"]))
        if run.given:
            past[:, :1] = 0
            if index == 0:
                done = first_frame()[: batch.size]
                continue
        noise = batch.noise.fork(index)
        x = noise.draw((SIZE[0], size, *SIZE[1:]))
        mask = frame_mask(blocks[: index + 1], window, sink)
        for step, t in enumerate(schedule.times):
            timestep = torch.cat([past, torch.full((batch.size, size), t)], 1)
            velocity: dict[str, Tensor] = {}
            for branch in guidance.branches:
                text = texts[branch]
                assert text is not None
                full = masked_forward(model, mask, torch.cat([done, x], 2), timestep, text)
                velocity[branch] = full[:, :, done.shape[2] :]
            x = schedule.step(step, x, guidance.combine(velocity), lambda n=noise, s=x.shape[1:]: n.draw(s))
        done = torch.cat([done, x], 2)
    return done


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize(
    ("run", "blocks"),
    [
        (T2V, [3] * 3),
        (ROLLING, [3] * 4),
        (Run(8, {"local_attn_size": 4, "num_frames_per_block": 2}), [2] * 4),
        (Run(5, {"num_frames_per_block": 1, "local_attn_size": 3, "sink_size": 1}), [1] * 5),
        (SELF_FORCING["i2v"], [1, 3, 3]),
    ],
)
def test_cached_equals_full_recomputation(run: Run, blocks: list[int], scale: float) -> None:
    """With guidance every branch has its own past."""
    batch = make_batch(run, run.frames, guidance_scale=scale)
    with torch.no_grad():
        expected = recompute(run, make_batch(run, run.frames), blocks, Guidance(scale))
    got = offline(make_engine(run), batch)
    torch.testing.assert_close(got, expected, rtol=0, atol=5 * TOLERANCE if scale > 1 else TOLERANCE)


@pytest.mark.parametrize("cfg", ["sequential", "batched"])
def test_plans_are_equal(cfg: str) -> None:
    got = offline(make_engine(ROLLING), make_batch(ROLLING, 12, guidance_scale=3.0), cfg)
    expected = offline(make_engine(ROLLING), make_batch(ROLLING, 12, guidance_scale=3.0))
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


def test_one_block_is_the_bidirectional_few_step_run() -> None:
    from kinetoscope.engine.strategies.dmd import DMDStrategy
    from kinetoscope.models.wan.config import WanConfig
    from kinetoscope.models.wan.transformer import WanTransformer3DModel
    from models.tiny_causal_wan import TINY

    got = offline(make_engine(T2V), make_batch(T2V, 3))
    wan = WanTransformer3DModel(WanConfig.from_dict(TINY)).eval()
    wan.load_state_dict(fixture_model().state_dict())
    parts: Any = SimpleNamespace(transformer=wan)
    batch = make_batch(T2V, 3)
    batch.noise = NoiseSource(SEEDS).fork(0)
    batch.latents = batch.noise.draw((SIZE[0], 3, *SIZE[1:]))
    with torch.no_grad():
        expected = DenoisingEngine(DMDStrategy(parts)).run(batch, ExecutionArgs()).latents
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


# -- streams ----------------------------------------------------------------------------------------------------------


def stream_blocks(engine: DenoisingEngine, stream: Any, count: int, item: Any = None) -> list[Tensor]:
    with torch.no_grad():
        return [engine.streaming_step(stream, item) for _ in range(count)]


def open_stream(engine: DenoisingEngine, run: Run, **more: Any) -> Any:
    with torch.no_grad():
        return engine.streaming_reset(make_batch(run, **more), ExecutionArgs())


@pytest.mark.parametrize(
    ("run", "experts", "count"),
    [(T2V, 1, 3), (ROLLING, 1, 4), (SELF_FORCING["i2v"], 1, 3), (SELF_FORCING["first_frame"], 1, 3)]
    + [(run, 2, 3) for run in TWO_EXPERTS.values()],
)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_stream_is_the_offline_run(run: Run, experts: int, count: int, scale: float) -> None:
    """Bit for bit, though a stream does not know its end."""
    engine = make_engine(run, experts)
    expected = offline(engine, make_batch(run, run.frames, guidance_scale=scale))
    stream = open_stream(engine, run, guidance_scale=scale)
    blocks = stream_blocks(engine, stream, count)
    assert torch.equal(torch.cat(blocks, 2), expected)
    assert engine.streaming_clear(stream).latents is None, "a stream keeps nothing of what it has given out"


def test_two_sessions_do_not_meet() -> None:
    engine = make_engine(ROLLING)
    alone = [stream_blocks(engine, open_stream(engine, ROLLING, seeds=[seed]), 5) for seed in (1, 2)]
    streams = [open_stream(engine, ROLLING, seeds=[seed]) for seed in (1, 2)]
    turns = [0, 1, 1, 0, 0, 1, 0, 1, 1, 0]
    mixed: list[list[Tensor]] = [[], []]
    for turn in turns:
        mixed[turn] += stream_blocks(engine, streams[turn], 1)
    for a, b in zip(alone, mixed, strict=True):
        assert torch.equal(torch.cat(a, 2), torch.cat(b, 2))


def test_sessions_interleave_between_steps() -> None:
    """Also inside a block: two offline runs advanced step by step in turns."""
    engine = make_engine(T2V)
    with torch.no_grad():
        states = [engine.strategy.prepare(make_batch(T2V, 6, seeds=[seed]), ExecutionArgs()) for seed in (1, 2)]
        runs = [engine.iterate(state) for state in states]
        while runs:
            runs = [run for run in runs if next(run, None) is not None]
    for seed, state in zip((1, 2), states, strict=True):
        got = engine.strategy.postprocess(state).latents
        assert got is not None and torch.equal(got, offline(engine, make_batch(T2V, 6, seeds=[seed])))


def test_a_long_stream_in_flat_memory() -> None:
    engine = make_engine(ROLLING)
    stream = open_stream(engine, ROLLING, seeds=[1])
    cache = stream.state.tables["rollout"].experts[0].conditioning["cache"]
    before = [k.data_ptr() for k in (*cache.keys, *cache.values)]
    for block in stream_blocks(engine, stream, 12):
        assert torch.isfinite(block).all()
    cache = stream.state.tables["rollout"].experts[0].conditioning["cache"]
    assert [k.data_ptr() for k in (*cache.keys, *cache.values)] == before
    assert cache.frames == 5


def test_a_stream_can_be_given_blocks() -> None:
    """The caller's latents take the place of a block: the same as a given condition."""
    run = SELF_FORCING["i2v"]
    engine = make_engine(run)
    expected = offline(engine, make_batch(run, run.frames))
    plain = dataclasses.replace(run, given=False)
    stream = open_stream(engine, plain)
    first = stream_blocks(engine, stream, 1, LatentBlock(1, first_frame()))
    rest = stream_blocks(engine, stream, 2)
    assert torch.equal(torch.cat([*first, *rest], 2), expected)


def test_events_of_a_rollout() -> None:
    engine = make_engine(SELF_FORCING["i2v"])
    state = engine.strategy.prepare(make_batch(SELF_FORCING["i2v"], 7), ExecutionArgs())
    with torch.no_grad():
        events: list[Event] = list(engine.iterate(state))
    kinds = [e.kind for e in events]
    block = ["block_start", *["step"] * 4, "block_end"]
    assert kinds == ["run_start", "block_start", "block_end", *block, *block, "run_end"]
    assert {e.num_blocks for e in events if e.block is not None} == {3}


def test_starting_noise_can_be_given() -> None:
    engine = make_engine(T2V)
    batch = make_batch(T2V, 6)
    batch.latents = NoiseSource([20, 21]).draw((SIZE[0], 6, *SIZE[1:]))
    given = batch.latents.clone()
    one = offline(engine, batch)
    other = make_batch(T2V, 6)
    other.latents = given
    assert torch.equal(one, offline(engine, other))
    assert not torch.equal(one, offline(engine, make_batch(T2V, 6)))


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "frames", "words"),
    [
        (T2V, 8, "no blocks of 3; nearest: 6 or 9"),
        (T2V, 24, "24 latent frames are more than the 21"),
        (T2V, None, "streaming_reset"),
        (Run(6, extra={"dmd_denoising_steps": None}), 6, "dmd_denoising_steps"),
        (Run(6, extra={"local_attn_size": 4, "sink_size": 2}), 6, "sink_size=2"),
    ],
)
def test_refusals(run: Run, frames: int | None, words: str) -> None:
    with pytest.raises(Exception, match=words) as caught:
        offline(make_engine(run), make_batch(run, frames))
    assert type(caught.value).__module__ == "kinetoscope.core.errors"


def test_an_unbounded_stream_ends_where_training_ended() -> None:
    run = Run(0, {"sliding_window_num_frames": 6})
    engine = make_engine(run)
    stream = open_stream(engine, run)
    stream_blocks(engine, stream, 2)
    with pytest.raises(InputError, match="latent frame 9 is beyond the 6"):
        stream_blocks(engine, stream, 1)


def test_a_window_can_be_asked_for() -> None:
    run = Run(12, {}, {"local_attn_size": 5, "sink_size": 1, "context_noise": 30})
    got = offline(make_engine(run), make_batch(run, 12))
    assert torch.equal(got, offline(make_engine(ROLLING), make_batch(ROLLING, 12)))


def test_given_frames_must_fit_blocks() -> None:
    batch = make_batch(T2V, 9)
    batch.condition = torch.zeros(2, SIZE[0], 5, *SIZE[1:])
    with pytest.raises(InputError, match="5 given latent frames"):
        offline(make_engine(T2V), batch)
    batch = make_batch(T2V, 9)
    batch.condition = torch.zeros(2, SIZE[0], 3, 2, 2)
    with pytest.raises(InputError, match="latents of a block have shape"):
        offline(make_engine(T2V), batch)


def test_a_prompt_can_change_between_blocks() -> None:
    """The next block follows the new prompt and still sees what was made."""
    engine = make_engine(T2V)
    plain = open_stream(engine, T2V)
    changed = open_stream(engine, T2V)
    assert torch.equal(stream_blocks(engine, plain, 1)[0], stream_blocks(engine, changed, 1)[0])
    changed.state.batch.prompt_embeds = prompt_embeds().flip(1)
    with torch.no_grad():
        engine.strategy.reprompt(changed.state)  # pyright: ignore[reportAttributeAccessIssue]
    other = make_batch(T2V)
    other.prompt_embeds = prompt_embeds().flip(1)
    with torch.no_grad():
        fresh = engine.streaming_reset(other, ExecutionArgs())
    assert not torch.equal(stream_blocks(engine, plain, 1)[0], after := stream_blocks(engine, changed, 1)[0])
    stream_blocks(engine, fresh, 1)
    assert not torch.equal(stream_blocks(engine, fresh, 1)[0], after), "the past was made with the old prompt"


@pytest.mark.parametrize(("run", "given"), [(T2V, 3), (T2V, 6), (SELF_FORCING["first_frame"], 4)])
def test_a_video_can_be_continued(run: Run, given: int) -> None:
    """Blocks that are given back are remembered as they were when they were made, so the rest is the same."""
    engine = make_engine(run)
    whole = offline(engine, make_batch(run, run.frames))
    batch = make_batch(run, run.frames)
    batch.condition = whole[:, :, :given].clone()
    assert torch.equal(offline(engine, batch), whole)


def test_closing_a_run_leaves_the_engine_usable() -> None:
    engine = make_engine(T2V)
    with torch.no_grad():
        state = engine.strategy.prepare(make_batch(T2V, 9), ExecutionArgs())
        events = engine.iterate(state)
        for _ in range(4):
            next(events)
        events.close()
    expected = load_file(FIXTURES / "runs.safetensors")["t2v"]
    torch.testing.assert_close(offline(engine, make_batch(T2V, 9)), expected, rtol=0, atol=1e-4)
