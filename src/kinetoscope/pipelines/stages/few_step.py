"""Stages of few-step and block-wise models: their list of timesteps, and videos made of blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from kinetoscope.core.errors import InputError
from kinetoscope.core.types import ExecutionArgs, ForwardBatch
from kinetoscope.diffusion.noise import NoiseSource
from kinetoscope.engine.strategies.causal import WINDOW, LatentVideo, plan_blocks
from kinetoscope.engine.strategies.dmd import STEPS, few_step_schedule
from kinetoscope.pipelines.stages.base import Stage
from kinetoscope.pipelines.stages.latents import LatentPreparationStage
from kinetoscope.pipelines.stages.validation import VideoGeometry


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
        given: Any = (batch.params.extra or {}).get(STEPS)
        if isinstance(given, (list, tuple)) and list(given) != self.steps:
            batch.params = dataclasses.replace(batch.params, num_inference_steps=len(given))
        batch.timesteps = torch.tensor(few_step_schedule(batch.params, self.boundary).times)
        return batch


class BlockValidationStage(Stage):
    """Refuses a number of frames that no blocks can make, before anything is loaded.

    Args:
        geometry: pixels to latents.
        config: of the transformer (`engine.strategies.causal.CausalTransformer.config`).
        alone: whether the first latent frame is a block of its own.
    """

    def __init__(self, geometry: VideoGeometry, config: Any, alone: bool) -> None:
        self.geometry, self.config, self.alone = geometry, config, alone

    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The same batch, or an `InputError`; a stream has no number of frames to refuse."""
        if batch.streaming:
            return batch
        frames = batch.params.num_frames
        assert frames
        count = (frames - 1) // self.geometry.temporal + 1
        try:
            plan_blocks(count, self.config.num_frames_per_block, self.alone, given=int(batch.image is not None))
        except InputError as error:
            raise InputError(
                f"num_frames={frames} are {count} latent frames of {self.geometry.temporal}: {error}"
            ) from error
        window = (batch.params.extra or {}).get(WINDOW)
        window = self.config.local_attn_size if window is None else window
        limit = self.config.sliding_window_num_frames
        if window == -1 and count > limit:
            raise InputError(
                f"num_frames={frames} are {count} latent frames, more than the {limit} this model was trained to see "
                f"at once; set {WINDOW} for a rolling window, or ask for at most "
                f"{(limit - 1) * self.geometry.temporal + 1} frames"
            )
        return batch


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
