"""Few-step denoising by a distilled student (DMD, arXiv 2405.14867): predict the clean sample, noise it again.

All that differs from other denoising is the schedule, so a few-step strategy is `FewSteps` before the strategy whose
rows it keeps: with two experts, with condition channels, with a given first frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kinetoscope.core.errors import InputError
from kinetoscope.core.types import ExecutionArgs, ForwardBatch, SamplingParams
from kinetoscope.diffusion.few_step import FewStepRun, FewStepSchedule
from kinetoscope.diffusion.noise import NoiseSource
from kinetoscope.diffusion.scheduler import ScheduleRun
from kinetoscope.engine.strategies.experts import ExpertStrategy
from kinetoscope.engine.strategies.standard import StandardStrategy

STEPS, WARP = "dmd_denoising_steps", "warp_denoising_step"
"""Names under which requests set the schedule (`SamplingParams.extra`)."""


def few_step_schedule(params: SamplingParams, boundary: float | None = None) -> FewStepSchedule:
    """The schedule a request asks for, for two experts where there is a `boundary` (a timestep).

    Raises:
        InputError: no list of timesteps, a number of steps that is not the list's, no shift, a solver,
            or a warp that is neither true nor false.
    """
    extra: Mapping[str, Any] = params.extra or {}
    steps: Any = extra.get(STEPS)
    if not isinstance(steps, (list, tuple)):
        raise InputError(f"few-step denoising needs the list {STEPS}; got {steps!r}")
    count = len(steps)  # pyright: ignore[reportUnknownArgumentType]
    if params.num_inference_steps not in (None, count):
        raise InputError(
            f"num_inference_steps={params.num_inference_steps}, but this model was distilled for the {count} timesteps "
            f"{steps}; to change them set {STEPS}"
        )
    if params.scheduler is not None:
        raise InputError(
            f"scheduler={params.scheduler!r}: this model was distilled for steps of its own; it has no solver to "
            f"choose ({STEPS} sets other steps)"
        )
    if params.flow_shift is None:
        raise InputError("few-step denoising needs flow_shift")
    if type(warp := extra.get(WARP, False)) is not bool:
        raise InputError(f"{WARP}={warp!r} is neither true nor false")
    return FewStepSchedule.make(
        steps,  # pyright: ignore[reportUnknownArgumentType]
        params.flow_shift,
        warp=warp,
        boundary=boundary,
    )


class FewSteps:
    """Makes the strategy that follows it few-step: no guidance, and each step jumps and noises again.

    Fresh noise is drawn from the run's source after the starting noise.
    """

    @property
    def boundary(self) -> float | None:
        """Timestep between two experts."""
        return None

    def start_schedule(self, batch: ForwardBatch, args: ExecutionArgs) -> ScheduleRun:
        """The run's own schedule.

        Raises:
            InputError: see `few_step_schedule` and `check_guidance`.
        """
        self.check_guidance(batch)
        batch.noise = batch.noise or NoiseSource(batch.seeds)
        return FewStepRun(few_step_schedule(batch.params, self.boundary), batch.noise, args.device)

    def check_guidance(self, batch: ForwardBatch) -> None:
        """Refuse guidance, which the student has learned in.

        Raises:
            InputError: it is asked for.
        """
        if batch.params.guided and batch.params.guidance_scale is not None:
            raise InputError(
                f"guidance_scale={batch.params.guidance_scale}: guidance is distilled into few-step models; use 1"
            )


class DMDStrategy(FewSteps, StandardStrategy):
    """Few steps of one network."""


class DMDExpertStrategy(FewSteps, ExpertStrategy):
    """Few steps of two: the high-noise one jumps to the boundary, and the step that crosses it noises nothing."""

    @property
    def boundary(self) -> float | None:
        """Of the stage."""
        return self.experts.boundary
