"""What Wan's own steps add to the standard ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kinetoscope.core.types import ExecutionArgs, ForwardBatch
from kinetoscope.diffusion.scheduler import ScheduleRun
from kinetoscope.engine.protocols import ModelInputs, StrategyState, Tree
from kinetoscope.engine.strategies.standard import StandardStrategy, conditioning_of, steps_of
from kinetoscope.models.wan.transformer import Modulation


class FirstFrameStrategy(StandardStrategy):
    """The first latent frame is given and stays: the network reads it clean, at timestep 0 (Wan 2.2 TI2V).

    Without `batch.condition` the standard strategy, bit for bit.
    """

    def prepare_steps(self, batch: ForwardBatch, scheduler: ScheduleRun) -> list[dict[str, Tree]]:
        """Modulation of every step; with a given frame, after them that of timestep 0."""
        times = scheduler.timesteps
        if batch.condition is not None:
            times = torch.cat([times, times.new_zeros(1)])
        return steps_of(self.parts.transformer, times)

    def make_model_inputs(self, state: StrategyState, t: float, step_idx: int) -> ModelInputs:
        """Rows whose first latent frame has timestep 0."""
        inputs = super().make_model_inputs(state, t, step_idx)
        if state.batch.condition is None:
            return inputs
        rows, frames = inputs.latents.shape[0], inputs.latents.shape[2]
        timestep = inputs.timestep.view(-1, 1).repeat(1, frames)
        timestep[:, 0] = 0
        clean: Modulation = state.tables["steps"][-1]["modulation"]
        noisy: Modulation = inputs.step["modulation"]
        frame_wise = Modulation(*(torch.cat([c, n.expand(-1, frames - 1, *n.shape[2:])], 1)
                                  for c, n in zip(clean, noisy, strict=True)))  # fmt: skip
        return replace(inputs, timestep=timestep.expand(rows, -1), step={"modulation": frame_wise})

    def model_latents(self, state: StrategyState) -> Tensor:
        """The sample with the given frame in its place."""
        return with_first_frame(state.latents, state.batch.condition)

    def postprocess(self, state: StrategyState) -> ForwardBatch:
        """The final sample, the given frame in its place, into `batch.latents`."""
        state.batch.latents = with_first_frame(state.latents, state.batch.condition)
        return state.batch


@dataclass(slots=True)
class WanControls:
    """What control models read beside the condition channels; of all branches alike.

    Attributes:
        camera: [B, C, t, H, W] rays of every pixel, those of a latent frame's frames on channels.
        picture: [B, 3, H, W] float32 in [-1, 1], a picture that the video should be like.
        reference: [B, C, h, w] its latents.
    """

    camera: Tensor | None = None
    picture: Tensor | None = None
    reference: Tensor | None = None


class ControlStrategy(StandardStrategy):
    """The standard steps of a model that is told the camera, or shown a reference (Wan2.1-Fun)."""

    def prepare_conditioning(
        self, batch: ForwardBatch, args: ExecutionArgs, branches: tuple[str, ...]
    ) -> dict[str, Tree]:
        """Text, image features, and the tokens of camera and reference."""
        given = batch.family
        assert isinstance(given, WanControls)
        extra = {"camera": given.camera, "reference": given.reference}
        return conditioning_of(self.parts.transformer, batch, args, branches, extra)


def with_first_frame(latents: Tensor, first: Tensor | None) -> Tensor:
    """`latents` [B, C, T, H, W] with its first frame replaced by `first` [B, C, 1, H, W]; unchanged for None."""
    return latents if first is None else torch.cat([first.to(latents), latents[:, :, 1:]], 2)
