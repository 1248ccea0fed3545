"""Rollouts of Matrix-Game against recordings of the published pipeline, and streams of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from kinetoscope.core.errors import InputError
from kinetoscope.core.types import ExecutionArgs, ForwardBatch, SamplingParams
from kinetoscope.engine.engine import DenoisingEngine
from kinetoscope.engine.protocols import BlockDenoisingStrategy
from kinetoscope.engine.strategies.matrix_game import Actions, MatrixGameStrategy
from kinetoscope.models.matrix_game import spec
from kinetoscope.models.matrix_game.transformer import MatrixGameTransformer3DModel
from models.tiny_matrix_game import VARIANTS, recorded, tiny_model

TOLERANCE = 1e-4  # of the standard deviation
BLOCK = 3


class RecordedNoise:
    """The published draws [blocks, steps - 1, 1, C, t, H, W] in the order in which blocks ask for them."""

    def __init__(self, redraws: Tensor) -> None:
        self.queue = list(redraws)

    def draw(self, shape: Any) -> Tensor:
        assert self.queue[0].shape[1:] == tuple(shape)
        return self.queue.pop(0)

    def fork(self, *key: int) -> RecordedNoise:
        return RecordedNoise(self.queue[key[0]])


@dataclass
class Parts:
    transformer: MatrixGameTransformer3DModel


def engine_of(variant: str) -> DenoisingEngine:
    return DenoisingEngine(MatrixGameStrategy(Parts(tiny_model(variant))))


def make_batch(variant: str, *, seed: int | None = None, frames: int | None = None, **changes: Any) -> ForwardBatch:
    """The recorded request; with a seed it has its own noise instead of the recorded."""
    given = recorded(f"{variant}.rollout")
    preset = spec.PRESETS[next(n for n in spec.PRESETS if variant in n.lower())]
    batch = ForwardBatch(preset, [""], [""], [seed or 0])
    batch.image_embeds = given["image_embeds"]
    batch.condition = given["condition"][:, :, :frames]
    batch.family = Actions(given["keyboard"], given.get("mouse"))
    if seed is None:
        batch.latents, batch.noise = given["noise"], RecordedNoise(given["redraws"])
    for name, value in changes.items():
        setattr(batch, name, value)
    return batch


def block_actions(batch: ForwardBatch, index: int) -> Actions:
    assert isinstance(batch.family, Actions)
    start = 0 if index == 0 else 9 + 12 * (index - 1)
    return batch.family.part(start, 9 + 12 * index)


@torch.no_grad()
def run(engine: DenoisingEngine, batch: ForwardBatch) -> Tensor:
    latents = engine.run_blocks(batch, ExecutionArgs()).latents
    assert latents is not None
    return latents


@torch.no_grad()
def stream(engine: DenoisingEngine, batch: ForwardBatch, blocks: int) -> Tensor:
    opened = engine.streaming_reset(batch, ExecutionArgs())
    parts = [engine.streaming_step(opened, block_actions(batch, i)) for i in range(blocks)]
    engine.streaming_clear(opened)
    return torch.cat(parts, 2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rollout_is_the_published_one(variant: str) -> None:
    expected = recorded(f"{variant}.rollout")["result"]
    got = run(engine_of(variant), make_batch(variant))
    assert (got - expected).abs().max() < TOLERANCE * expected.std()


@pytest.mark.parametrize("variant", VARIANTS)
def test_stream_equals_offline_run(variant: str) -> None:
    engine = engine_of(variant)
    assert torch.equal(stream(engine, make_batch(variant, seed=5), 3), run(engine, make_batch(variant, seed=5)))
    assert torch.equal(stream(engine, make_batch(variant), 3), run(engine, make_batch(variant)))


def test_interleaved_sessions_equal_each_alone() -> None:
    engine, seeds = engine_of("base"), (7, 8)
    batches = [make_batch("base", seed=s) for s in seeds]
    assert isinstance(batches[1].family, Actions)
    batches[1].family = Actions(1 - batches[1].family.keyboard, batches[1].family.mouse)
    alone = [stream(engine, b, 3) for b in batches]
    with torch.no_grad():
        opened = [engine.streaming_reset(b, ExecutionArgs()) for b in batches]
        made: list[list[Tensor]] = [[], []]
        for session, block in ((0, 0), (1, 0), (1, 1), (0, 1), (1, 2), (0, 2)):
            made[session].append(engine.streaming_step(opened[session], block_actions(batches[session], block)))
    for parts, expected in zip(made, alone, strict=True):
        assert torch.equal(torch.cat(parts, 2), expected)
    assert not torch.equal(*alone)


def test_rows_of_a_batch_are_their_own_videos() -> None:
    engine = engine_of("gta")
    alone = [run(engine, make_batch("gta", seed=s)) for s in (1, 2)]
    both = make_batch("gta", seed=1)
    both.prompts, both.negative_prompts, both.seeds = ["", ""], ["", ""], [1, 2]
    assert both.condition is not None and both.image_embeds is not None and isinstance(both.family, Actions)
    assert both.family.mouse is not None
    both.condition, both.image_embeds = both.condition.repeat(2, 1, 1, 1, 1), both.image_embeds.repeat(2, 1, 1)
    both.family = Actions(both.family.keyboard.repeat(2, 1, 1), both.family.mouse.repeat(2, 1, 1))
    torch.testing.assert_close(run(engine, both), torch.cat(alone), rtol=0, atol=1e-4)


def test_what_is_pressed_matters_from_then_on() -> None:
    """An action in the last pixel frame of block 0 is first read by block 1, as published."""
    engine, base = engine_of("base"), make_batch("base", seed=3)
    first = run(engine, base)
    changed = make_batch("base", seed=3)
    assert isinstance(changed.family, Actions)
    keyboard = changed.family.keyboard.clone()
    keyboard[:, 8] = 1 - keyboard[:, 8]
    changed.family = Actions(keyboard, changed.family.mouse)
    second = run(engine, changed)
    assert torch.equal(first[:, :, :BLOCK], second[:, :, :BLOCK])
    assert not torch.equal(first[:, :, BLOCK : 2 * BLOCK], second[:, :, BLOCK : 2 * BLOCK])


def test_a_stream_goes_on_beyond_its_condition() -> None:
    engine, batch = engine_of("base"), make_batch("base", seed=4, frames=6)
    assert batch.condition is not None
    longer = make_batch("base", seed=4)
    longer.condition = torch.cat([batch.condition, batch.condition[:, :, -1:].repeat(1, 1, 3, 1, 1)], 2)
    assert torch.equal(stream(engine, batch, 3), run(engine, longer))


def test_is_a_block_strategy_and_reports_steps() -> None:
    engine = engine_of("base")
    assert isinstance(engine.strategy, BlockDenoisingStrategy)
    with torch.no_grad():
        state = engine.strategy.prepare(make_batch("base"), ExecutionArgs())
        kinds = [e.kind for e in engine.iterate(state)]
    assert kinds == ["run_start", *["block_start", *["step"] * 3, "block_end"] * 3, "run_end"]


def test_refuses_what_does_not_fit() -> None:
    engine = engine_of("base")
    with pytest.raises(InputError, match="5 latent frames are no multiple of the block, 3; nearest: 3 or 6"):
        run(engine, make_batch("base", frames=5))
    with pytest.raises(InputError, match="needs the actions"):
        run(engine, make_batch("base", family=None))
    with pytest.raises(InputError, match="need actions of 33 frames; got 20"):
        run(engine, make_batch("base", family=Actions(torch.zeros(1, 20, 4), torch.zeros(1, 20, 2))))
    with pytest.raises(InputError, match="image"):
        run(engine, make_batch("base", image_embeds=None))
    with pytest.raises(InputError, match="20 channels"):
        run(engine, make_batch("base", condition=torch.zeros(1, 16, 6, 4, 6)))
    batch = make_batch("base")
    batch.params = SamplingParams(guidance_scale=3.0).over(batch.params)
    with pytest.raises(InputError, match="guidance"):
        run(engine, batch)
    opened = engine.streaming_reset(make_batch("base"), ExecutionArgs())
    with pytest.raises(InputError, match=r"keyboard actions of block 0 have shape \[1, 12, 4\]; it needs \[1, 9, 4\]"):
        engine.streaming_step(opened, Actions(torch.zeros(1, 12, 4), torch.zeros(1, 12, 2)))
    opened = engine.streaming_reset(make_batch("base"), ExecutionArgs())
    with pytest.raises(InputError, match="with a mouse"):
        engine.streaming_step(opened, Actions(torch.zeros(1, 9, 4)))
    opened = engine.streaming_reset(make_batch("base"), ExecutionArgs())
    with pytest.raises(InputError, match="got str"):
        engine.streaming_step(opened, "w")
