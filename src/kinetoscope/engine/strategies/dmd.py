"""Few-step denoising by a distilled student (DMD, arXiv 2405.14867): predict the clean sample, noise it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from kinetoscope.core.errors import InputError
from kinetoscope.core.types import ExecutionArgs, ForwardBatch, Noise, SamplingParams
from kinetoscope.diffusion.few_step import FewStepSchedule
from kinetoscope.diffusion.guidance import Guidance
from kinetoscope.diffusion.noise import NoiseSource
from kinetoscope.engine.protocols import ModelInputs, StrategyState, Tree, take_rows
from kinetoscope.engine.strategies.standard import VideoTransformer, conditioning_of, split_branches

STEPS, WARP, BOUNDARY = "dmd_denoising_steps", "warp_denoising_step", "boundary_ratio"
"""Names under which requests set the schedule (`SamplingParams.extra`)."""


class FewStepParts(Protocol):
    """What a few-step strategy needs of the stage that owns it."""

    @property
    def transformer(self) -> VideoTransformer: ...

    @property
    def transformer_2(self) -> VideoTransformer | None:
        """The low-noise expert, where there are two."""
        ...


def schedule_of(params: SamplingParams, experts: int) -> FewStepSchedule:
    """The schedule a request asks for.

    Raises:
        InputError: no list of timesteps, a number of steps that is not the list's, no shift, or experts and boundary
            that do not go together.
    """
    extra: Mapping[str, Any] = params.extra or {}
    steps, ratio = extra.get(STEPS), extra.get(BOUNDARY)
    if not isinstance(steps, (list, tuple)):
        raise InputError(f"few-step denoising needs the list {STEPS}; got {steps!r}")
    count: int = len(steps)  # pyright: ignore[reportUnknownArgumentType]
    if params.num_inference_steps not in (None, count):
        raise InputError(
            f"num_inference_steps={params.num_inference_steps}, but this model was distilled for the {count} timesteps "
            f"{steps}; to change them set {STEPS}"
        )
    if params.flow_shift is None:
        raise InputError("few-step denoising needs flow_shift")
    if (ratio is not None) != (experts == 2):
        raise InputError(f"{BOUNDARY}={ratio}, but the model has {experts} transformer{'s' * (experts > 1)}")
    return FewStepSchedule.make(
        steps,  # pyright: ignore[reportUnknownArgumentType]
        params.flow_shift,
        warp=bool(extra.get(WARP, False)),
        boundary_ratio=ratio,
    )


class DMDStrategy:
    """The sample alone, no guidance: each step jumps to the clean sample and noises it for the next.

    Fresh noise is drawn from the run's source after the starting noise. With two experts the high-noise one jumps to
    the boundary, and the step that crosses it noises nothing.

    Args:
        parts: the transformer or the two experts, usually the denoising stage.
    """

    def __init__(self, parts: FewStepParts) -> None:
        self.parts = parts

    @property
    def experts(self) -> list[VideoTransformer]:
        """The transformers, high noise first."""
        second = self.parts.transformer_2
        return [self.parts.transformer] if second is None else [self.parts.transformer, second]

    def prepare(self, batch: ForwardBatch, args: ExecutionArgs) -> StrategyState:
        """Schedule; text K/V, modulation of every step and RoPE tables, once an expert.

        Raises:
            InputError: see `schedule_of`; or guidance is asked for, which the student has learned in.
        """
        params = batch.params
        assert batch.latents is not None
        if params.guidance_scale not in (None, 1.0):
            raise InputError(
                f"guidance_scale={params.guidance_scale}: guidance is distilled into few-step models; use 1"
            )
        schedule = schedule_of(params, len(self.experts))
        latents = batch.latents.to(args.device, torch.float32)
        times = torch.tensor(schedule.times, device=args.device)
        guidance = Guidance()
        conditioning = [conditioning_of(e, batch, args, guidance.branches) for e in self.experts]
        return StrategyState(
            batch=batch,
            args=args,
            latents=latents,
            guidance=guidance,
            noise=batch.noise or NoiseSource(batch.seeds),
            times=schedule.times,
            conditioning=conditioning[0],
            tables={
                "schedule": schedule,
                "conditioning": conditioning,
                "steps": [e.prepare_timesteps(times) for e in self.experts],
                "shared": [e.prepare_shared(latents.shape) for e in self.experts],
            },
        )

    def make_model_inputs(self, state: StrategyState, t: float, step_idx: int) -> ModelInputs:
        """The sample, for the expert of the step."""
        schedule: FewStepSchedule = state.tables["schedule"]
        expert = schedule.expert(step_idx)
        return self.rows(
            state, expert, t, step_idx, state.tables["conditioning"][expert], state.tables["shared"][expert]
        )

    def rows(
        self, state: StrategyState, expert: int, t: float, index: int, conditioning: dict[str, Tree], shared: Tree
    ) -> ModelInputs:
        """The sample once for each branch, at entry `index` of the prepared timesteps, for one expert."""
        branches, batch = state.guidance.branches, state.latents.shape[0]
        latents = state.latents.to(state.args.dtype)
        if len(branches) > 1:
            latents = latents.repeat(len(branches), 1, 1, 1, 1)
        timestep = torch.full((latents.shape[0],), t, device=latents.device)
        step = take_rows(state.tables["steps"][expert], slice(index, index + 1))
        return ModelInputs(latents, timestep, branches, batch, conditioning, {"expert": expert, **shared, **step})

    def forward(self, state: StrategyState, model_inputs: ModelInputs) -> Tensor:
        """One forward of the rows' expert."""
        shared = dict(model_inputs.shared)
        expert: int = shared.pop("expert")
        network = self.experts[expert]
        return network(model_inputs.latents, model_inputs.timestep, **model_inputs.conditioning, **shared)

    def cfg_combine(self, state: StrategyState, noise_pred: Tensor) -> Tensor:
        """Guidance in float32 where there is any."""
        return state.guidance.combine(split_branches(state, noise_pred))

    def scheduler_step(self, state: StrategyState, noise_pred: Tensor, t: float) -> Tensor:
        """Jump and noise, float32 (the jump in float64)."""
        schedule: FewStepSchedule = state.tables["schedule"]
        return jump(state, schedule, state.noise, noise_pred)

    def postprocess(self, state: StrategyState) -> ForwardBatch:
        """The final sample into `batch.latents`."""
        state.batch.latents = state.latents
        return state.batch


def jump(state: StrategyState, schedule: FewStepSchedule, noise: Noise, velocity: Tensor) -> Tensor:
    """The sample after the step in progress, with fresh noise from `noise` where the schedule wants some."""
    x = state.latents
    return schedule.step(state.active.index, x, velocity, lambda: noise.draw(x.shape[1:]).to(x.device))
