"""What LTX-Video does differently in a run: the schedule's shift follows the size, and given frames stay clean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kinetoscope.core.errors import InputError
from kinetoscope.core.types import ExecutionArgs, ForwardBatch, Noise, SamplingParams
from kinetoscope.diffusion.scheduler import SchedulerAdapter, ScheduleRun
from kinetoscope.engine.protocols import ModelInputs, StrategyState, Tree
from kinetoscope.engine.strategies.standard import DenoisingParts, StandardStrategy, noise_of, steps_of


def log_shift(scheduler: SchedulerAdapter, tokens: int) -> float:
    """Logarithm of the sigma shift of a video of `tokens` tokens: linear in them between two published points."""
    config = scheduler.config
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (high - low) / (many - few)
    return tokens * slope + (low - slope * few)


def start_schedule(
    scheduler: SchedulerAdapter,
    params: SamplingParams,
    latent_shape: Sequence[int],
    device: torch.device | str = "cpu",
    noise: Noise | None = None,
) -> ScheduleRun:
    """A private run of the schedule for latents [..., T, H, W].

    Noise levels fall evenly from 1 to 1/S and are then shifted. Where the prototype's shift is dynamic, a `flow_shift`
    given by the user takes its place. Another solver takes the same shift as a fixed one.

    Raises:
        InputError: one step, where the schedule has none.
    """
    steps = params.num_inference_steps
    assert steps is not None
    chosen = scheduler.override(params.scheduler, params.flow_shift)
    mu = None
    if scheduler.dynamic:
        given = params.flow_shift
        mu = log_shift(scheduler, math.prod(latent_shape[-3:])) if given is None else math.log(given)
    if chosen.class_name != scheduler.class_name:
        fixed = scheduler.override(params.scheduler, params.flow_shift if mu is None else math.exp(mu))
        return fixed.start(steps, device, noise=noise)
    sigmas = [1.0 + (1.0 / steps - 1.0) * i / max(steps - 1, 1) for i in range(steps)]
    if steps == 1 and chosen.config.get("shift_terminal"):  # stretches what lies between the first level and the last
        raise InputError("num_inference_steps=1 is too few for this model's schedule; take 2 or more")
    return chosen.start(steps, device, sigmas=sigmas, mu=mu, noise=noise)


class LTXStrategy(StandardStrategy):
    """Standard steps; with `batch.condition` [B, C, K, h, w] the first K latent frames are clean and never move.

    Args:
        parts: the transformer and the scheduler prototype.
        spatial, temporal: pixels and frames a latent position spans, to which rotary positions are scaled.
    """

    def __init__(self, parts: DenoisingParts, *, spatial: int, temporal: int) -> None:
        super().__init__(parts)
        self.spatial = spatial
        self.temporal = temporal

    def start_schedule(self, batch: ForwardBatch, args: ExecutionArgs) -> ScheduleRun:
        """See `start_schedule` above."""
        assert batch.latents is not None
        return start_schedule(self.parts.scheduler, batch.params, batch.latents.shape, args.device, noise_of(batch))

    def prepare_steps(self, batch: ForwardBatch, scheduler: ScheduleRun) -> list[dict[str, Tree]]:
        """Modulation of each step; one a latent frame where some are clean."""
        return steps_of(self.parts.transformer, _timesteps(batch, scheduler))

    def prepare_shared(self, batch: ForwardBatch, latents: Tensor) -> dict[str, Tree]:
        """Rotary table in seconds and pixels."""
        assert batch.params.fps is not None
        transformer: Any = self.parts.transformer
        scale = (self.temporal / batch.params.fps, self.spatial, self.spatial)
        return transformer.prepare_shared(latents.shape, rope_interpolation_scale=scale)

    def model_latents(self, state: StrategyState) -> Tensor:
        """The sample alone: the condition is its first frames, not further channels."""
        return state.latents

    def make_model_inputs(self, state: StrategyState, t: float, step_idx: int) -> ModelInputs:
        """The sample once for each branch; timestep 0 for clean frames."""
        inputs = super().make_model_inputs(state, t, step_idx)
        if kept_frames(state.batch):
            assert state.scheduler is not None
            inputs.timestep = _timesteps(state.batch, state.scheduler)[step_idx].expand(len(inputs.latents), -1)
        return inputs

    def scheduler_step(self, state: StrategyState, noise_pred: Tensor, t: float) -> Tensor:
        """One scheduler step of the frames that are not given."""
        assert state.scheduler is not None
        kept = kept_frames(state.batch)
        moved = state.scheduler.step(noise_pred[:, :, kept:], state.active.index, state.latents[:, :, kept:])
        return torch.cat([state.latents[:, :, :kept], moved], dim=2) if kept else moved


def kept_frames(batch: ForwardBatch) -> int:
    """Latent frames at the start that are given and stay clean."""
    return 0 if batch.condition is None else batch.condition.shape[2]


def _timesteps(batch: ForwardBatch, scheduler: ScheduleRun) -> Tensor:
    """[S], or [S, T] with zeros for clean frames"""
    kept = kept_frames(batch)
    if not kept:
        return scheduler.timesteps
    assert batch.latents is not None
    timesteps = scheduler.timesteps.unsqueeze(1).repeat(1, batch.latents.shape[2])
    timesteps[:, :kept] = 0
    return timesteps
