"""LongCat-Video: text to video, and any number of clean frames continued, with or without their keys and values cached.

Sources: arXiv 2510.22200 and github meituan-longcat/LongCat-Video. What differs from the standard step: the network
predicts the negative of the flow velocity; timesteps are per latent frame, 0 for condition frames, which never change;
guidance scales the unconditional row as CFG-Zero* does (arXiv 2503.18886); the noise levels are a list of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from kinetoscope.core.context import ForwardContext, forward_context
from kinetoscope.core.errors import InputError
from kinetoscope.core.transfer import as_floats
from kinetoscope.core.types import ExecutionArgs, ForwardBatch, Noise, SamplingParams
from kinetoscope.diffusion.convention import shift_sigma
from kinetoscope.diffusion.guidance import COND, UNCOND, cfg_zero_scale
from kinetoscope.diffusion.scheduler import SchedulerAdapter, ScheduleRun
from kinetoscope.engine.protocols import ModelInputs, StrategyState, Tree
from kinetoscope.engine.strategies.standard import StandardStrategy, VideoTransformer, combine, noise_of, split_branches

TAIL_START, TAIL_STEPS = 500.0, 10  # of `enhance_hf`: even steps from this timestep to 0
DISTILLED_STEPS = 50  # noise levels the distilled model knows


@dataclass(frozen=True, slots=True)
class LongCatInputs:
    """What a LongCat run needs beside the batch's own fields (`ForwardBatch.family`). Condition latents are
    `ForwardBatch.condition` [B, C, T_cond, h, w]: the first frames of the video.

    Attributes:
        use_kv_cache: forward the condition frames once and keep their keys and values.
        offload_kv_cache: keep those on the CPU between steps.
        enhance_hf: from timestep 500 on ten even steps instead of the schedule's.
        use_distill: the noise levels of the distilled model.
        t_thresh: start at this noise level, in (0, 1): refinement of a video. None: from pure noise.
        stage1_video: videos to refine, one uint8 [T, h, w, 3] a sample; () once they are latents.
        keep_frames: frames [start, stop) of the decoded video that are the result; None: all of them.
        scale_over_noise_frames: take the CFG-Zero* scale over the frames that are denoised, whatever is predicted. As
            published it is taken over all that a forward predicts: condition frames too, but for those in a cache.
    """

    use_kv_cache: bool = False
    offload_kv_cache: bool = False
    enhance_hf: bool = False
    use_distill: bool = False
    t_thresh: float | None = None
    stage1_video: tuple[Any, ...] = ()
    keep_frames: tuple[int, int] | None = None
    scale_over_noise_frames: bool = False


class ContinuingTransformer(VideoTransformer, Protocol):
    """A transformer that can be asked for the keys and values of clean frames."""

    def cache_condition(self, latents: Tensor) -> Any: ...


def start_schedule(
    prototype: SchedulerAdapter,
    params: SamplingParams,
    inputs: LongCatInputs,
    device: torch.device | str = "cpu",
    noise: Noise | None = None,
) -> ScheduleRun:
    """The run's private scheduler at the published noise levels.

    1 to 0.001 in even steps, or levels of the distilled model; then shifted; then the tail of `enhance_hf` or the start
    of `t_thresh`, which are levels after the shift.

    Raises:
        InputError: a solver with noise levels of its own was asked for, or more steps than the distilled model knows.
    """
    steps = params.num_inference_steps
    assert steps is not None
    prototype = prototype.override(params.scheduler, params.flow_shift)
    if prototype.class_name != "FlowMatchEulerDiscreteScheduler":
        raise InputError(
            f"scheduler={params.scheduler!r}: LongCat-Video has noise levels of its own, which this solver does not "
            "take; use euler or heun"
        )
    if inputs.use_distill:
        if steps > DISTILLED_STEPS:
            raise InputError(f"num_inference_steps={steps}: the distilled model knows {DISTILLED_STEPS} noise levels")
        chosen = [1.0 - (i * DISTILLED_STEPS // steps) / DISTILLED_STEPS for i in range(steps)]
        levels = torch.tensor(chosen, dtype=torch.float32)
    else:
        levels = torch.linspace(1.0, 0.001, steps)
    times = 1000.0 * shift_sigma(levels, prototype.shift)
    if inputs.enhance_hf:
        tail = torch.arange(TAIL_STEPS, 0, -1) / TAIL_STEPS * TAIL_START
        levels = torch.cat([levels[times > TAIL_START], _unshift(tail / 1000.0, prototype.shift)])
    if inputs.t_thresh:
        start = torch.tensor([inputs.t_thresh], dtype=torch.float32)
        levels = torch.cat([_unshift(start, prototype.shift), levels[times < 1000.0 * start]])
    return prototype.start(len(levels), device, sigmas=as_floats(levels), noise=noise)


def _unshift(s: Tensor, shift: float) -> Tensor:
    """The noise level that `shift_sigma` takes to `s`."""
    return s / (shift - (shift - 1) * s)


class LongCatStrategy(StandardStrategy):
    """Rows [uncond, cond] of the whole video, or of its noisy frames where the condition frames are cached.

    The sample is the whole video at all times; its first `condition` frames are the clean ones.
    """

    def prepare(self, batch: ForwardBatch, args: ExecutionArgs) -> StrategyState:
        """As standard; the condition frames in their place, and cached once for the run if asked for."""
        state = super().prepare(batch, args)
        inputs = inputs_of(batch)
        frames, cache = 0, None
        if batch.condition is not None:
            condition = batch.condition.to(state.latents)
            frames = condition.shape[2]
            if not 0 < frames < state.latents.shape[2]:
                raise InputError(f"{frames} condition latents leave nothing to make of {state.latents.shape[2]}")
            state.latents = torch.cat([condition, state.latents[:, :, frames:]], dim=2)
            if inputs.use_kv_cache:
                cache = self._cache(condition, args, inputs.offload_kv_cache)
        state.tables["condition"] = frames
        state.tables["kv_cache"] = cache  # condition frames read no text, so it is the same for all branches
        return state

    def start_schedule(self, batch: ForwardBatch, args: ExecutionArgs) -> ScheduleRun:
        """See `start_schedule`."""
        return start_schedule(self.parts.scheduler, batch.params, inputs_of(batch), args.device, noise_of(batch))

    def make_model_inputs(self, state: StrategyState, t: float, step_idx: int) -> ModelInputs:
        """The frames that are forwarded, once for each branch; a timestep a frame."""
        assert state.scheduler is not None
        branches, condition = state.guidance.branches, state.tables["condition"]
        cache = state.tables["kv_cache"]
        cached = 0 if cache is None else condition
        latents = state.latents[:, :, cached:].to(state.args.dtype).repeat(len(branches), 1, 1, 1, 1)
        timestep = state.scheduler.timesteps[step_idx].repeat(latents.shape[0], latents.shape[2])  # [R, T]
        timestep[:, : condition - cached] = 0
        shared: dict[str, Tree] = {**state.tables["shared"], "num_cond_latents": condition, "kv_cache": cache}
        return ModelInputs(latents, timestep, branches, state.latents.shape[0], state.conditioning, shared)

    def cfg_combine(self, state: StrategyState, noise_pred: Tensor) -> Tensor:
        """CFG with the unconditional row scaled to its projection on the conditional one; then the flow velocity."""
        rows = split_branches(state, noise_pred.float())
        if UNCOND in rows:
            start = 0
            if inputs_of(state.batch).scale_over_noise_frames:
                start = noise_pred.shape[2] - (state.latents.shape[2] - state.tables["condition"])
            scale = cfg_zero_scale(rows[COND][:, :, start:], rows[UNCOND][:, :, start:])
            rows = {COND: rows[COND], UNCOND: scale * rows[UNCOND]}
        return -combine(state, rows)

    def scheduler_step(self, state: StrategyState, noise_pred: Tensor, t: float) -> Tensor:
        """One Euler step of the noisy frames; the condition frames as they are."""
        assert state.scheduler is not None
        clean, noisy = state.latents.tensor_split([state.tables["condition"]], dim=2)
        noisy = state.scheduler.step(noise_pred[:, :, -noisy.shape[2] :], state.active.index, noisy)
        return torch.cat([clean, noisy], dim=2) if clean.shape[2] else noisy

    def _cache(self, condition: Tensor, args: ExecutionArgs, offload: bool) -> Any:
        """Keys and values of the condition frames [B, C, T_cond, h, w] in every block."""
        transformer = cast(ContinuingTransformer, self.parts.transformer)
        with (
            forward_context(ForwardContext(args.attention)),
            torch.autocast(args.device.type, args.dtype, enabled=args.autocast),
        ):
            cache = transformer.cache_condition(condition.to(args.dtype))
        return [type(pair)(*(t.cpu() for t in pair)) for pair in cache] if offload else cache


def inputs_of(batch: ForwardBatch) -> LongCatInputs:
    """The batch's own LongCat settings, or those of plain text to video."""
    return batch.family if isinstance(batch.family, LongCatInputs) else LongCatInputs()
