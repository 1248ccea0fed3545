"""Cosmos Predict: guidance on clean estimates (or velocities), given frames kept and restored at every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from torch import Tensor

from kinetoscope.core.errors import InputError
from kinetoscope.core.transfer import to_device
from kinetoscope.core.types import ExecutionArgs, ForwardBatch
from kinetoscope.diffusion.convention import Convention
from kinetoscope.diffusion.denoiser import Denoiser
from kinetoscope.diffusion.guidance import COND, UNCOND, Guidance
from kinetoscope.diffusion.scheduler import ScheduleRun, check_flow
from kinetoscope.engine.protocols import ModelInputs, StrategyState, Tree, split_rows
from kinetoscope.engine.strategies.standard import (
    DenoisingParts,
    StandardStrategy,
    VideoTransformer,
    combine,
    noise_of,
    split_branches,
)


@dataclass(frozen=True, slots=True)
class CosmosInputs:
    """What a Cosmos request has besides the common fields; `ForwardBatch.condition` holds the latents of given frames
    [B, C, frames, h, w].

    Attributes:
        fps: frames a second that rotary positions are told; None: the model does not read it.
        mask: whether the network reads a channel that marks given frames.
        frames: given latent frames, at the start; 0: none.
        level: noise level the network is told for given frames; None: that of the step.
        augment_sigma: noise added to given frames, fresh for every row of every step (Predict 1); a step at or below
            this level treats no frame as given. None: given frames are clean.
        guide_frames: whether the unconditional row is told that no frame is given.
    """

    fps: float | None = None
    mask: bool = False
    frames: int = 0
    level: float | None = None
    augment_sigma: float | None = None
    guide_frames: bool = False


class CosmosTransformer(VideoTransformer, Protocol):
    """A `VideoTransformer` whose positions know the frame rate, and whose timesteps may be one a latent frame."""

    def prepare_shared(self, latent_shape: Sequence[int], *, fps: float | None = None) -> dict[str, Tree]: ...


class CosmosStrategy(StandardStrategy):
    """Rows [uncond, cond], given frames put in and restored, guidance c + w (c - u), one scheduler step.

    With an "edm" convention predictions are clean estimates and the scheduler steps on those (Predict 1 and 2); with a
    flow they are velocities, and a given frame moves straight from its noise to its latent (Predict 2.5). A batch whose
    `family` is not `CosmosInputs` has no given frames and no frame rate.

    Args:
        parts: the transformer and the scheduler prototype, usually the denoising stage.
        convention: how the network speaks.
    """

    def __init__(self, parts: DenoisingParts, convention: Convention) -> None:
        super().__init__(parts)
        self.convention = convention

    def prepare(self, batch: ForwardBatch, args: ExecutionArgs) -> StrategyState:
        """As the standard strategy; noise at the first level, and what given frames are restored to."""
        state = super().prepare(batch, args)
        assert state.scheduler is not None
        if self.convention.preconditioning is not None:
            state.latents = state.latents * state.scheduler.sigmas[0]
        inputs = _inputs(batch)
        if inputs.frames:
            assert batch.condition is not None
            missing = state.latents.shape[2] - batch.condition.shape[2]
            given = torch.nn.functional.pad(batch.condition.to(state.latents), (0, 0, 0, 0, 0, missing))
            velocity = state.latents - given
            frame = torch.arange(state.latents.shape[2], device=state.latents.device)
            state.tables["given"] = given
            state.tables["is_given"] = (frame < inputs.frames).view(1, 1, -1, 1, 1)
            state.tables["restored"] = velocity if self.convention.preconditioning is None else given
        return state

    def make_guidance(self, batch: ForwardBatch) -> Guidance:
        """c + w (c - u), which is u + (w + 1) (c - u); w = 1 switches it off all the same."""
        guidance = super().make_guidance(batch)
        if guidance.kind == "cfg-zero" and self.convention.preconditioning is not None:
            raise InputError("guidance='cfg-zero' is made for velocities; this model is guided on clean estimates")
        return guidance if guidance.scale == 1.0 else replace(guidance, scale=guidance.scale + 1.0)

    def start_schedule(self, batch: ForwardBatch, args: ExecutionArgs) -> ScheduleRun:
        """The whole schedule: a given video is continued, never noised, so `strength` has no meaning.

        Raises:
            ConfigError: the network predicts a flow, and the noise levels of the schedule are others.
        """
        params = batch.params
        assert params.num_inference_steps is not None
        prototype = self.parts.scheduler.override(params.scheduler, params.flow_shift)
        run = prototype.start(params.num_inference_steps, args.device, noise=noise_of(batch))
        if self.convention.preconditioning is None:
            check_flow(prototype, run.sigmas[0])
        return run

    def prepare_conditioning(
        self, batch: ForwardBatch, args: ExecutionArgs, branches: tuple[str, ...]
    ) -> dict[str, Tree]:
        """Text, and where the network reads it the mask of given frames: [R, 1, T, 1, 1], 1 where given."""
        conditioning = super().prepare_conditioning(batch, args, branches)
        inputs = _inputs(batch)
        if inputs.mask:
            assert batch.latents is not None
            samples, _, frames = batch.latents.shape[:3]
            mask = torch.zeros(len(branches), samples, 1, frames, 1, 1, device=args.device)
            mask[:, :, :, : inputs.frames] = 1.0
            if inputs.guide_frames and UNCOND in branches:
                mask[branches.index(UNCOND)] = 0.0
            conditioning["condition_mask"] = mask.flatten(0, 1)
        return conditioning

    def prepare_steps(self, batch: ForwardBatch, scheduler: ScheduleRun) -> list[dict[str, Tree]]:
        """Return the timesteps as the network takes them: [1] a step, or [1, T] where given frames have their own.

        What the network makes of a timestep is computed ahead, but where frames differ: it is large there.
        """
        inputs, device = _inputs(batch), scheduler.timesteps.device
        timestep = to_device(self.convention.timestep(torch.tensor(scheduler.sigmas[:-1])), device)
        if inputs.frames and inputs.level is not None:
            assert batch.latents is not None
            timestep = timestep.unsqueeze(1).repeat(1, batch.latents.shape[2])
            timestep[:, : inputs.frames] = float(self.convention.timestep(torch.tensor(inputs.level)))
            return split_rows({"timestep": timestep}, len(timestep))
        ahead = self.parts.transformer.prepare_timesteps(timestep)
        return split_rows({"timestep": timestep, **ahead}, len(timestep))

    def prepare_shared(self, batch: ForwardBatch, latents: Tensor) -> dict[str, Tree]:
        """Positions, in time by the frame rate where the model reads it."""
        return cast(CosmosTransformer, self.parts.transformer).prepare_shared(latents.shape, fps=_inputs(batch).fps)

    def make_model_inputs(self, state: StrategyState, t: float, step_idx: int) -> ModelInputs:
        """The scaled sample once for each branch, given frames put in; every row has the same timesteps."""
        branches = state.guidance.branches
        rows = self._rows(state, step_idx, branches)
        latents = torch.cat(rows).to(state.args.dtype)
        step = dict(state.tables["steps"][step_idx])
        timestep = step.pop("timestep")
        step = step or self.parts.transformer.prepare_timesteps(timestep)
        timestep = timestep.expand(len(latents), *timestep.shape[1:])
        return ModelInputs(latents, timestep, branches, len(rows[0]), state.conditioning, state.tables["shared"], step)

    def cfg_combine(self, state: StrategyState, noise_pred: Tensor) -> Tensor:
        """Clean estimates (EDM) or velocities of each branch with given frames restored, then guidance."""
        predictions: Mapping[str, Tensor] = split_branches(state, noise_pred)
        index = state.active.index
        if self.convention.preconditioning is not None:
            assert state.scheduler is not None
            level = torch.tensor(state.scheduler.sigmas[index])
            denoiser = Denoiser(self.parts.transformer, self.convention)
            predictions = {b: denoiser.to_x0(p.float(), state.latents, level) for b, p in predictions.items()}
        if _given_at(state, index):
            is_given, restored = state.tables["is_given"], state.tables["restored"]
            predictions = {b: torch.where(is_given, restored, p.float()) for b, p in predictions.items()}
        return combine(state, predictions)

    def _rows(self, state: StrategyState, index: int, branches: tuple[str, ...]) -> list[Tensor]:
        """What each branch reads of the sample, [B, C, T, H, W] float32 each."""
        scaled = state.latents
        edm = self.convention.preconditioning
        if edm is not None:
            assert state.scheduler is not None
            scaled = scaled * edm.c_in(torch.tensor(state.scheduler.sigmas[index]))
        augment = _inputs(state.batch).augment_sigma
        given: dict[str, Tensor] = {}
        for branch in (COND, UNCOND):  # the published order of draws; they are also made where they are not used
            if augment is not None and branch in branches:
                assert edm is not None
                noise = to_device(state.noise.draw(state.latents.shape[1:]), state.latents.device)
                noisy = state.tables["given"] + augment * noise
                given[branch] = noisy * edm.c_in(torch.tensor(augment))
        if not _given_at(state, index):
            return [scaled] * len(branches)
        clean: Tensor = state.tables["given"]
        return [torch.where(state.tables["is_given"], given.get(branch, clean), scaled) for branch in branches]


def _inputs(batch: ForwardBatch) -> CosmosInputs:
    return batch.family if isinstance(batch.family, CosmosInputs) else CosmosInputs()


def _given_at(state: StrategyState, index: int) -> bool:
    """Whether given frames are put in and restored at step `index`."""
    inputs = _inputs(state.batch)
    assert state.scheduler is not None
    return inputs.frames > 0 and (inputs.augment_sigma is None or inputs.augment_sigma < state.scheduler.sigmas[index])
