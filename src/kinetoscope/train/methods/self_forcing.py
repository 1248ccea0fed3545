"""Self-forcing (arXiv 2506.08009): a causal student learns from the videos that it makes itself, block after block.

A block is made in the few steps of sampling, stopped at one drawn at random, and remembered; the next one sees what the
student made, not data, so that training meets the errors that sampling makes. The finished video is judged as a whole,
by distribution matching. Rollouts run the engine and the strategy that sample the student: what is trained on is what
will be sampled, bit for bit where both use the same kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kinetoscope.core.errors import ConfigError
from kinetoscope.core.types import ExecutionArgs, ForwardBatch, SamplingParams
from kinetoscope.diffusion.few_step import FewStepRun
from kinetoscope.diffusion.noise import NoiseSource
from kinetoscope.engine.engine import DenoisingEngine
from kinetoscope.engine.hooks.sequence import SequenceParallel
from kinetoscope.engine.protocols import BlockContext, Event, ModelInputs, StrategyState
from kinetoscope.engine.strategies.causal import CONTEXT_NOISE
from kinetoscope.engine.strategies.dmd import STEPS, WARP
from kinetoscope.nn.ring_cache import with_own_caches
from kinetoscope.train.methods.base import MethodSettings
from kinetoscope.train.methods.dmd2 import DMD2, DMD2Settings
from kinetoscope.train.roles import CausalModelBase, ModelBase, TrainBatch

REMEMBERED = 1
"""Key, beside the block's number, of the noise of what is remembered: sampling draws nothing from it."""


class SelfForcingSettings(DMD2Settings):
    """Settings of `SelfForcing`; those of `DMD2Settings`, and:

    Attributes:
        exits: at which step a block is stopped: "block", one drawn for each block, or "video", one for all; "last": the
            last one, always.
        gradient_frames: gradients go into the last so many latent frames (whole blocks), for memory; None: into all.
        context_noise: timestep in [0, 1000) at which a finished block is remembered, and to which it is noised then.
        sampling: what is between two steps: "sde", fresh noise, as in sampling; "ode", the noise that the step found.
    """

    name: str = "self_forcing"
    exits: Literal["block", "video", "last"] = "block"
    gradient_frames: int | None = Field(default=None, gt=0)
    context_noise: int = Field(default=0, ge=0, lt=1000)
    sampling: Literal["sde", "ode"] = "sde"

    def unread_options(self) -> dict[str, str]:
        """Return what DMD2 leaves out, and compiled blocks, which are those of predictions of whole videos."""
        why = "rollouts go block by block with a cache, and compiled blocks are of predictions of whole videos"
        return {**super().unread_options(), "student.compile": why}


@dataclass(frozen=True, slots=True)
class Exits:
    """How a rollout of blocks goes.

    Attributes:
        steps: the step at which each block is stopped.
        gradient_start: first latent frame whose block has gradients.
        context_noise: timestep of what is remembered.
        ode: no fresh noise between steps.
    """

    steps: Sequence[int]
    gradient_start: int = 0
    context_noise: int = 0
    ode: bool = False


@dataclass(frozen=True, slots=True)
class StudentParts:
    """The student as the stage that a strategy is of."""

    transformer: Any
    transformer_2: Any = None
    boundary: float = 0.0


class RolloutSteps:
    """Makes the strategy that follows it (`rollout_strategy`) stop early, and differentiable.

    A block's last step has a gradient, through everything but its past: keys and values of earlier blocks are
    constants. Passes that remember have none.

    Args:
        student: whose blocks are recomputed in the backward pass, if its role says so.
        exits: where blocks stop.

    Attributes:
        made: the finished blocks, with their gradients.
    """

    def __init__(self, student: CausalModelBase, exits: Exits) -> None:
        super().__init__(StudentParts(student.transformer))  # pyright: ignore[reportCallIssue]
        self.student, self.exits, self.made = student, exits, list[Tensor]()
        self._whole: Any = super()  # the strategy that follows, as it samples

    def process_block(self, state: StrategyState, ctx: BlockContext, item: Any) -> Iterator[Event]:
        """The steps up to the block's exit."""
        yield from ctx.steps(state.times[: self.exits.steps[ctx.index] + 1])

    def forward(self, state: StrategyState, model_inputs: ModelInputs) -> Tensor:
        """With a gradient in a block's last step alone, from memory that later passes do not write over."""
        step = state.active
        start: int = model_inputs.shared["start_frame"]
        wanted = step.index + 1 == step.count and start >= self.exits.gradient_start
        if not (wanted and torch.is_grad_enabled()):
            with torch.no_grad():
                return self._whole.forward(state, model_inputs)
        own = {name: with_own_caches(tree) for name, tree in model_inputs.conditioning.items()}
        model_inputs.conditioning = own
        with self.student.partial_passes():
            return self._whole.forward(state, model_inputs)

    def scheduler_step(self, state: StrategyState, noise_pred: Tensor, t: float) -> Tensor:
        """The clean block at its exit; before, the next step's sample."""
        step, run = state.active, state.scheduler
        assert isinstance(run, FewStepRun)
        if step.index + 1 == step.count:
            return run.schedule.predict(step.index, state.latents, noise_pred)
        if not self.exits.ode:
            return self._whole.scheduler_step(state, noise_pred, t)
        x0 = run.schedule.predict(step.index, state.latents, noise_pred)
        noise = x0 + noise_pred  # v = n - x0
        return run.schedule.renoise(step.index, x0, lambda: noise)

    def update_context(self, state: StrategyState, ctx: BlockContext, item: Any) -> None:
        """Remember the block, noised to the level of the context, without a gradient; it keeps its own."""
        made = state.latents
        self.made.append(made)
        with torch.no_grad():
            if level := self.exits.context_noise / 1000:
                noise = NoiseSource(state.batch.seeds).fork(ctx.index, REMEMBERED).draw(made.shape[1:])
                state.latents = (1 - level) * made + level * noise.to(made.device)
            self._whole.update_context(state, ctx, item)


def rollout_strategy(student: CausalModelBase, exits: Exits) -> Any:
    """What samples the student, stopping at `exits`: `RolloutSteps` before the family's own strategy."""
    base = student.strategy
    return type(f"{base.__name__}Rollout", (RolloutSteps, base), {})(student, exits)


def roll_out(
    student: CausalModelBase,
    batch: TrainBatch,
    settings: DMD2Settings,
    exits: Exits,
    seeds: Sequence[int],
) -> Tensor:
    """Videos [B, C, T, H, W] by the student, from noise of `seeds` as in sampling, of the size of the batch's latents.

    Args:
        settings: the few steps.
        exits: where blocks stop; at their last step, the result is that of the engine's own sampling.
    """
    extra = {STEPS: list(settings.steps), WARP: settings.warp, CONTEXT_NOISE: exits.context_noise}
    params = SamplingParams(guidance_scale=1.0, flow_shift=student.shift, extra=extra)
    run = ForwardBatch(params, [""] * batch.rows, [""] * batch.rows, list(seeds), noise=NoiseSource(seeds))
    student.tell(run, batch)
    strategy = rollout_strategy(student, exits)
    hooks = [] if student.shard is None else [SequenceParallel(student.shard)]
    device = batch.latents.device
    low = torch.is_autocast_enabled(device.type)  # loop.precision; the engine would turn it off
    dtype = torch.get_autocast_dtype(device.type) if low else torch.float32
    args = ExecutionArgs(device, dtype, autocast=low, ulysses=student.devices)
    DenoisingEngine(strategy, hooks).run_blocks(run, args)
    return torch.cat(strategy.made, 2)


class SelfForcing(DMD2):
    """DMD2 of a causal student's own rollouts.

    Args:
        roles: "student", causal, "critic" and "teacher", which may see whole videos at once.
        settings: see `SelfForcingSettings`.

    Raises:
        ConfigError: the student is not causal, or `rollout` is that of DMD2 on data.
    """

    settings_class: ClassVar[type[MethodSettings]] = SelfForcingSettings

    def __init__(self, roles: Mapping[str, ModelBase], settings: SelfForcingSettings) -> None:
        super().__init__(roles, settings)
        student = roles["student"]
        if not isinstance(student, CausalModelBase):
            raise ConfigError("self_forcing is of causal students; dmd2 is the same for those that see the whole video")
        if settings.rollout != "simulate":
            raise ConfigError("self_forcing learns from its own rollouts: method.rollout=data_latent is of dmd2")
        self.causal, self.forcing = student, settings

    def rollout(self, batch: TrainBatch, generator: torch.Generator, pace: torch.Generator) -> Tensor:
        """Videos by the student, block after block."""
        seeds = torch.randint(0, 2**62, (batch.rows,), generator=generator).tolist()
        exits = self.draw_exits(batch.latents.shape[2], pace)
        return roll_out(self.causal, batch, self.forcing, exits, seeds)

    def draw_exits(self, frames: int, generator: torch.Generator) -> Exits:
        """Where the blocks of a video of so many latent frames stop."""
        settings, last = self.forcing, len(self.schedule) - 1
        drawn = torch.randint(0, last + 1, (len(self.causal.blocks(frames)),), generator=generator).tolist()
        steps = {"block": drawn, "video": drawn[:1] * len(drawn), "last": [last] * len(drawn)}[settings.exits]
        start = max(0, frames - (settings.gradient_frames or frames))
        if start > frames - (last_block := self.causal.blocks(frames)[-1]):
            raise ConfigError(
                f"method.gradient_frames={settings.gradient_frames}: no whole block is in the last so many latent "
                f"frames, so nothing would be learned; use {last_block} or more"
            )
        return Exits(steps, start, settings.context_noise, settings.sampling == "ode")
