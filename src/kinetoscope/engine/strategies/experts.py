"""Two networks, one for high and one for low noise levels, each with its own guidance (Wan 2.2)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from kinetoscope.core.transfer import to_device
from kinetoscope.core.types import ExecutionArgs, ForwardBatch
from kinetoscope.diffusion.guidance import Guidance
from kinetoscope.engine.protocols import ModelInputs, StrategyState, Tree
from kinetoscope.engine.strategies.standard import (
    DenoisingParts,
    StandardStrategy,
    VideoTransformer,
    conditioning_of,
    place_condition,
    steps_of,
)


class ExpertParts(DenoisingParts, Protocol):
    """What the strategy needs of the stage that owns it."""

    @property
    def transformer_2(self) -> VideoTransformer: ...

    @property
    def boundary(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Expert:
    """One network, and what is its own in a run."""

    transformer: VideoTransformer
    guidance: Guidance
    conditioning: dict[str, Tree]


class ExpertStrategy(StandardStrategy):
    """The standard steps; at timesteps below `parts.boundary` the second network takes over with `guidance_scale_2`.

    Which network serves a step is decided from Python numbers before the run, and a network that serves none is not
    loaded. The two must have the same sizes.
    """

    def __init__(self, parts: ExpertParts) -> None:
        super().__init__(parts)
        self.experts = parts

    def prepare(self, batch: ForwardBatch, args: ExecutionArgs) -> StrategyState:
        """As the standard strategy; text K/V and modulation by the network that will use them."""
        scheduler = self.start_schedule(batch, args)
        high = sum(t >= self.experts.boundary for t in scheduler.times)
        params = batch.params
        scale = params.guidance_scale or 1.0
        low_scale = scale if params.guidance_scale_2 is None else params.guidance_scale_2
        sides: list[tuple[VideoTransformer, float, Tensor]] = []
        if high:
            sides.append((self.parts.transformer, scale, scheduler.timesteps[:high]))
        if high < len(scheduler):
            sides.append((self.experts.transformer_2, low_scale, scheduler.timesteps[high:]))
        experts: list[Expert] = []
        for transformer, weight, _ in sides:
            guidance = self.make_guidance(replace(batch, params=replace(params, guidance_scale=weight)))
            experts.append(Expert(transformer, guidance, conditioning_of(transformer, batch, args, guidance.branches)))
        assert batch.latents is not None and batch.noise is not None
        latents = to_device(batch.latents, args.device, torch.float32)
        place_condition(batch, args)
        return StrategyState(
            batch=batch,
            args=args,
            latents=latents,
            guidance=experts[0].guidance,
            noise=batch.noise,
            times=scheduler.times,
            scheduler=scheduler,
            conditioning=experts[0].conditioning,
            tables={
                "experts": [experts[0 if i < high else -1] for i in range(len(scheduler))],
                "steps": [step for network, _, times in sides for step in steps_of(network, times)],
                "shared": sides[0][0].prepare_shared(latents.shape),
            },
        )

    def make_model_inputs(self, state: StrategyState, t: float, step_idx: int) -> ModelInputs:
        """The rows that the step's network needs."""
        expert: Expert = state.tables["experts"][step_idx]
        state.guidance, state.conditioning = expert.guidance, expert.conditioning
        return super().make_model_inputs(state, t, step_idx)

    def network(self, state: StrategyState) -> VideoTransformer:
        """The expert of the step in progress."""
        expert: Expert = state.tables["experts"][state.active.index]
        return expert.transformer
