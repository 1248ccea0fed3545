"""Stages of few-step and block-wise models: their list of timesteps, and videos made of blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kinetoscope.core.errors import InputError
from kinetoscope.core.types import ExecutionArgs, ForwardBatch, SamplingParams
from kinetoscope.diffusion.noise import NoiseSource
from kinetoscope.engine.strategies.causal import CONTEXT_NOISE, SINK, WINDOW, LatentVideo, plan_blocks
from kinetoscope.engine.strategies.dmd import STEPS, few_step_schedule
from kinetoscope.pipelines.stages.base import Stage
from kinetoscope.pipelines.stages.latents import LatentPreparationStage
from kinetoscope.pipelines.stages.validation import VideoGeometry

MAX_CONTEXT_NOISE = 1000
"""The largest timestep."""


class FewStepTimestepStage(Stage):
    """Fills `timesteps` from the request's list; another list than the model's brings its own number of steps.

    Args:
        steps: the model's list.
        boundary: timestep between two experts; None: one network.
    """

    def __init__(self, steps: Sequence[int], boundary: float | None = None) -> None:
        self.steps, self.boundary = list(steps), boundary

    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The batch with `timesteps` [S] on the CPU.

        Raises:
            InputError: a list that no run could follow, or a number of steps that is not the list's.
        """
        batch.params = self._resolved(batch.params)
        batch.timesteps = torch.tensor(few_step_schedule(batch.params, self.boundary).times)
        return batch

    def check_params(self, params: SamplingParams) -> None:
        """Refuse what `forward` refuses.

        Raises:
            InputError: see `forward`.
        """
        few_step_schedule(self._resolved(params), self.boundary)

    def _resolved(self, params: SamplingParams) -> SamplingParams:
        given: Any = (params.extra or {}).get(STEPS)
        if isinstance(given, (list, tuple)) and list(given) != self.steps:
            return dataclasses.replace(params, num_inference_steps=len(given))
        return params


class BlockValidationStage(Stage):
    """Refuses a number of frames that no blocks can make, before anything is loaded.

    Frames that do not fill the last block are left out: `params` then say how many there will be.

    Args:
        geometry: pixels to latents.
        config: of the transformer (`engine.strategies.causal.CausalTransformer.config`).
        alone: whether the first latent frame is a block of its own.
    """

    def __init__(self, geometry: VideoGeometry, config: Any, alone: bool) -> None:
        self.geometry, self.config, self.alone = geometry, config, alone

    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The batch with the number of frames that its blocks make; a stream has no number of frames to refuse.

        Raises:
            InputError: no blocks make it, or a parameter of the rollout does not fit.
        """
        self._check_rollout(batch.params.extra or {})
        if batch.streaming:
            return batch
        frames = batch.params.num_frames
        assert frames
        count = (frames - 1) // self.geometry.temporal + 1
        try:
            plan = plan_blocks(count, self.config.num_frames_per_block, self.alone, given=int(batch.image is not None))
        except InputError as error:
            raise InputError(
                f"num_frames={frames} are {count} latent frames of {self.geometry.temporal}: {error}"
            ) from error
        if batch.image is not None and len(plan) == 1:
            least = 1 + self.config.num_frames_per_block * self.geometry.temporal
            raise InputError(f"num_frames={frames} leave no block to make after the image; ask for {least} or more")
        window = (batch.params.extra or {}).get(WINDOW)
        window = self.config.local_attn_size if window is None else window
        limit = self.config.sliding_window_num_frames
        if window == -1 and count > limit:
            raise InputError(
                f"num_frames={frames} are {count} latent frames, more than the {limit} this model was trained to see "
                f"at once; set {WINDOW} for a rolling window, or ask for at most "
                f"{(limit - 1) * self.geometry.temporal + 1} frames"
            )
        made = sum(plan)
        if batch.latents is not None and batch.latents.shape[2] == count:
            batch.latents = batch.latents[:, :, :made]
        batch.params = dataclasses.replace(batch.params, num_frames=(made - 1) * self.geometry.temporal + 1)
        return batch

    def _check_rollout(self, extra: Mapping[str, Any]) -> None:
        """Refuse parameters of the rollout of the wrong kind, or that leave no room; None is the model's own."""
        most = self.geometry.positions[0]
        for name, low in ((WINDOW, -1), (SINK, 0)):
            value = extra.get(name)
            if value is not None and (type(value) is not int or not low <= value <= most):
                raise InputError(f"{name}={value!r} should be a whole number of latent frames in [{low}, {most}]")
        window, sink = (
            getattr(self.config, name) if extra.get(name) is None else extra[name] for name in (WINDOW, SINK)
        )
        room = self.config.sliding_window_num_frames if window == -1 else window
        if room < sink + self.config.num_frames_per_block:
            raise InputError(
                f"{WINDOW}={window} with {SINK}={sink}: {room} latent frames have no room for the sink and a block of "
                f"{self.config.num_frames_per_block}"
            )
        noise = extra.get(CONTEXT_NOISE)
        if noise is not None and (type(noise) not in (int, float) or not 0 <= noise <= MAX_CONTEXT_NOISE):
            raise InputError(f"{CONTEXT_NOISE}={noise!r} should be a number in [0, {MAX_CONTEXT_NOISE}]")


class BlockLatentStage(LatentPreparationStage):
    """Fills `noise` and the size of the latents; noise is drawn block by block, unless the caller gave it."""

    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The batch with `family` a `LatentVideo`, and given latents checked."""
        if batch.latents is not None:
            batch = super().forward(batch, args)
        params = batch.params
        assert params.num_frames and params.height and params.width
        frames, height, width = self.geometry.latent_size(params.num_frames, params.height, params.width)
        batch.noise = NoiseSource(batch.seeds)
        batch.family = LatentVideo(self.channels, height, width, None if batch.streaming else frames)
        return batch
