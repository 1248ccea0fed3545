"""Step-by-step denoising with classifier-free guidance and a scheduler: most bidirectional models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from kinetoscope.core.transfer import to_device
from kinetoscope.core.types import ExecutionArgs, ForwardBatch, Noise, SamplingParams
from kinetoscope.diffusion.guidance import COND, UNCOND, Guidance
from kinetoscope.diffusion.noise import NoiseSource
from kinetoscope.diffusion.scheduler import SchedulerAdapter, ScheduleRun
from kinetoscope.engine.protocols import ModelInputs, StrategyState, Tree, split_rows


class VideoTransformer(Protocol):
    """What a family's transformer offers: a forward, and its run-constant parts computed ahead.

    Whatever a `prepare_*` method returns is passed back to the forward by name; computing it ahead changes no bit.
    """

    def __call__(self, latents: Tensor, timestep: Tensor, **conditioning: Tree) -> Tensor: ...

    def prepare_conditioning(
        self, *, encoder_hidden_states: Tensor, text_lengths: Tensor | None, **more: Tree
    ) -> dict[str, Tree]:
        """Row-first trees that depend on the prompt (and image) alone."""
        ...

    def prepare_timesteps(self, timesteps: Tensor) -> dict[str, Tree]:
        """Trees with a leading axis S for the S timesteps of a run."""
        ...

    def prepare_shared(self, latent_shape: Sequence[int]) -> dict[str, Tree]:
        """Trees that depend on the latents' shape [R, C, T, H, W] alone (not on R)."""
        ...


class TimestepTables(Protocol):
    """What computes ahead of the timesteps of a run, as `VideoTransformer` does."""

    def prepare_timesteps(self, timesteps: Tensor) -> Mapping[str, Tree]: ...


class DenoisingParts(Protocol):
    """What a strategy needs of the stage that owns it."""

    @property
    def transformer(self) -> VideoTransformer: ...

    @property
    def scheduler(self) -> SchedulerAdapter: ...


class StandardStrategy:
    """Rows [uncond, cond] of the noisy sample, classifier-free guidance, one scheduler step.

    `batch.condition` is joined to the sample as further channels; `batch.image_embeds` condition every branch alike.

    Args:
        parts: the transformer and the scheduler prototype, usually the denoising stage.
    """

    def __init__(self, parts: DenoisingParts) -> None:
        self.parts = parts

    def prepare(self, batch: ForwardBatch, args: ExecutionArgs) -> StrategyState:
        """Private scheduler; text K/V, modulation of every step and RoPE tables, once.

        A family whose arithmetic differs in one of these overrides the method that makes it.
        """
        assert batch.latents is not None
        guidance = self.make_guidance(batch)
        latents = to_device(batch.latents, args.device, torch.float32)
        place_condition(batch, args)
        scheduler = self.start_schedule(batch, args)
        return StrategyState(
            batch=batch,
            args=args,
            latents=latents,
            guidance=guidance,
            noise=noise_of(batch),
            times=scheduler.times,
            scheduler=scheduler,
            conditioning=self.prepare_conditioning(batch, args, guidance.branches),
            tables={
                "steps": self.prepare_steps(batch, scheduler),
                "shared": self.prepare_shared(batch, latents),
            },
        )

    def make_guidance(self, batch: ForwardBatch) -> Guidance:
        """Which rows a step needs, and how they combine."""
        params = batch.params
        return Guidance.make(params.guidance_scale or 1.0, params.guidance_rescale or 0.0, params.guidance)

    def start_schedule(self, batch: ForwardBatch, args: ExecutionArgs) -> ScheduleRun:
        """The run's private scheduler."""
        params = batch.params
        assert params.num_inference_steps is not None
        prototype = self.parts.scheduler.override(params.scheduler, params.flow_shift)
        return prototype.start(params.num_inference_steps, args.device, begin=first_step(params), noise=noise_of(batch))

    def prepare_conditioning(
        self, batch: ForwardBatch, args: ExecutionArgs, branches: tuple[str, ...]
    ) -> dict[str, Tree]:
        """What the rows are conditioned on, branch-major."""
        return conditioning_of(self.parts.transformer, batch, args, branches)

    def prepare_steps(self, batch: ForwardBatch, scheduler: ScheduleRun) -> list[dict[str, Tree]]:
        """Trees of each step, whose tensors have a first axis of 1."""
        return steps_of(self.parts.transformer, scheduler.timesteps)

    def prepare_shared(self, batch: ForwardBatch, latents: Tensor) -> dict[str, Tree]:
        """Trees that all rows of all steps share."""
        return self.parts.transformer.prepare_shared(latents.shape)

    def make_model_inputs(self, state: StrategyState, t: float, step_idx: int) -> ModelInputs:
        """The sample once for each branch."""
        assert state.scheduler is not None
        branches = state.guidance.branches
        batch = state.latents.shape[0]
        latents = self.model_latents(state).to(state.args.dtype)
        if batch == 1:
            latents = latents.expand(len(branches), *latents.shape[1:])  # nothing to copy, and nobody writes into it
        elif len(branches) > 1:
            latents = torch.cat([latents] * len(branches))  # a fifth of the time of `repeat`
        timestep = state.scheduler.timesteps[step_idx].expand(len(branches) * batch)
        step = state.tables["steps"][step_idx]
        return ModelInputs(latents, timestep, branches, batch, state.conditioning, state.tables["shared"], step)

    def model_latents(self, state: StrategyState) -> Tensor:
        """What the network sees of the sample, [B, C', T, H, W]."""
        condition = state.batch.condition
        if condition is None:
            return state.latents
        return torch.cat([state.latents, condition.to(state.latents)], 1)

    def network(self, state: StrategyState) -> VideoTransformer:
        """The network of the step in progress."""
        return self.parts.transformer

    def forward(self, state: StrategyState, model_inputs: ModelInputs) -> Tensor:
        """One forward of the step's network."""
        return self.network(state)(model_inputs.latents, model_inputs.timestep, **model_inputs.arguments)

    def cfg_combine(self, state: StrategyState, noise_pred: Tensor) -> Tensor:
        """Classifier-free guidance in float32."""
        return combine(state, split_branches(state, noise_pred))

    def scheduler_step(self, state: StrategyState, noise_pred: Tensor, t: float) -> Tensor:
        """One step of the run's own scheduler, float32."""
        assert state.scheduler is not None
        return state.scheduler.step(noise_pred, state.active.index, state.latents)

    def postprocess(self, state: StrategyState) -> ForwardBatch:
        """The final sample into `batch.latents`."""
        state.batch.latents = state.latents
        return state.batch


def noise_of(batch: ForwardBatch) -> Noise:
    """Return the run's source of random numbers; make it from the seeds where no stage has made it."""
    batch.noise = batch.noise or NoiseSource(batch.seeds)
    return batch.noise


def place_condition(batch: ForwardBatch, args: ExecutionArgs) -> None:
    """Move the batch's condition to the device, so that no step does."""
    if batch.condition is not None:
        batch.condition = to_device(batch.condition, args.device)


def conditioning_of(
    transformer: VideoTransformer,
    batch: ForwardBatch,
    args: ExecutionArgs,
    branches: tuple[str, ...],
    extra: Mapping[str, Tensor | None] | None = None,
) -> dict[str, Tree]:
    """What the rows of a transformer are conditioned on, branch-major: text, and image features where there are any.

    Args:
        extra: further tensors [B, ...] by the transformer's names for them, which condition every branch alike.
    """
    embeds, lengths = stack_text(batch, branches)
    more: dict[str, Tree] = {} if args.text_mode is None else {"text_mode": args.text_mode}
    for name, value in {"image_embeds": batch.image_embeds, **(extra or {})}.items():
        if value is not None:
            more[name] = value.to(args.device, args.dtype).repeat(len(branches), *[1] * (value.ndim - 1))
    return transformer.prepare_conditioning(
        encoder_hidden_states=embeds.to(args.device, args.dtype), text_lengths=lengths, **more
    )


def steps_of(transformer: TimestepTables, timesteps: Tensor) -> list[dict[str, Tree]]:
    """What a transformer computes ahead of each of `timesteps` [S] or [S, T]; tensors have a first axis of 1."""
    return split_rows(transformer.prepare_timesteps(timesteps), len(timesteps))


def first_step(params: SamplingParams) -> int:
    """Steps left out at the start of the schedule: none, or those that would noise a given video more than asked."""
    assert params.num_inference_steps is not None
    if params.strength is None:
        return 0
    return params.num_inference_steps - min(
        int(params.num_inference_steps * params.strength), params.num_inference_steps
    )


def combine(state: StrategyState, predictions: Mapping[str, Tensor]) -> Tensor:
    """The guided prediction of the step in progress, [B, ...] float32."""
    step = state.active
    return state.guidance.combine(predictions, step.index, step.count, state.memory)


def split_branches(state: StrategyState, noise_pred: Tensor) -> Mapping[str, Tensor]:
    """branch -> its [B, ...] rows of `noise_pred`, as views."""
    branches = state.active.branches
    return dict(zip(branches, noise_pred.chunk(len(branches)), strict=True))


def stack_text(batch: ForwardBatch, branches: tuple[str, ...]) -> tuple[Tensor, Tensor | None]:
    """Embeddings [R, L, D] and true lengths [R] of all rows, branch-major."""
    embeds = {COND: batch.prompt_embeds, UNCOND: batch.negative_embeds}
    lengths = {COND: batch.prompt_lengths, UNCOND: batch.negative_lengths}
    rows = [e for b in branches if (e := embeds[b]) is not None]
    counts = [n for b in branches if (n := lengths[b]) is not None]
    assert len(rows) == len(branches), "text encoding left a branch without embeddings"
    return torch.cat(rows), torch.cat(counts) if len(counts) == len(branches) else None
