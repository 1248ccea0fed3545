"""The schedule and the starting noise."""

from __future__ import annotations

import torch

from kinetoscope.core.errors import InputError
from kinetoscope.core.types import ExecutionArgs, ForwardBatch, SamplingParams
from kinetoscope.diffusion.noise import NoiseSource
from kinetoscope.diffusion.scheduler import SchedulerAdapter
from kinetoscope.engine.strategies.standard import first_step
from kinetoscope.pipelines.lazy import Lazy, resolve
from kinetoscope.pipelines.stages.base import Stage
from kinetoscope.pipelines.stages.validation import VideoGeometry


class TimestepPreparationStage(Stage):
    """Fills `timesteps` with the schedule the run will follow, for stages that depend on it.

    Args:
        scheduler: the prototype, or lazy. The run makes its own private scheduler from the same one.
    """

    def __init__(self, scheduler: SchedulerAdapter | Lazy[SchedulerAdapter]) -> None:
        self._scheduler = scheduler

    def reads_shift(self, scheduler: str | None) -> bool:
        """Return whether the noise levels depend on the shift, with that solver or (None) the model's own."""
        return resolve(self._scheduler).override(scheduler).reads_shift

    def check_params(self, params: SamplingParams) -> None:
        """Refuse a solver or a shift that the schedule cannot have.

        Raises:
            InputError, ConfigError: see `SchedulerAdapter.override`.
        """
        resolve(self._scheduler).override(params.scheduler, params.flow_shift)

    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The batch with `timesteps` [S] on the CPU."""
        params = batch.params
        assert params.num_inference_steps is not None
        prototype = resolve(self._scheduler).override(params.scheduler, params.flow_shift)
        batch.timesteps = prototype.start(params.num_inference_steps, begin=first_step(params)).timesteps
        return batch


class LatentPreparationStage(Stage):
    """Fills `noise` and, unless the caller gave them, `latents`.

    Args:
        geometry: pixels to latents.
        channels: latent channels C.
    """

    def __init__(self, geometry: VideoGeometry, channels: int) -> None:
        self.geometry = geometry
        self.channels = channels

    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The batch with `latents` [B, C, T, H, W] float32 on the CPU.

        Raises:
            InputError: given latents have another shape or hold values that are not finite.
        """
        params = batch.params
        assert params.num_frames and params.height and params.width
        shape = (self.channels, *self.geometry.latent_size(params.num_frames, params.height, params.width))
        batch.noise = NoiseSource(batch.seeds)
        if batch.latents is None:
            batch.latents = batch.noise.draw(shape)
            return batch
        expected = (batch.size, *shape)
        if tuple(batch.latents.shape) != expected:
            raise InputError(f"latents have shape {tuple(batch.latents.shape)}; this request needs {expected}")
        if not torch.isfinite(batch.latents).all():
            raise InputError("latents hold values that are not finite")
        batch.latents = batch.latents.to(torch.float32)
        return batch
