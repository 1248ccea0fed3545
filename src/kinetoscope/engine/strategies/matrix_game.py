"""A world that is played: blocks of latent frames, each made from what the player does and from what was seen before
(Matrix-Game 2, arXiv 2508.13009).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from kinetoscope.core.errors import InputError
from kinetoscope.core.transfer import device_constant, to_device
from kinetoscope.core.types import ExecutionArgs, ForwardBatch
from kinetoscope.diffusion.few_step import FewStepRun
from kinetoscope.diffusion.guidance import COND, Guidance
from kinetoscope.diffusion.noise import NoiseSource
from kinetoscope.engine.protocols import BlockContext, BlockPlan, Event, ModelInputs, StrategyState, Tree
from kinetoscope.engine.strategies.dmd import few_step_schedule
from kinetoscope.engine.strategies.standard import steps_of
from kinetoscope.nn.action import ActionConfig, action_windows, pad_actions

CONTEXT_NOISE = "context_noise"
"""Name under which requests set the timestep of the clean pass (`SamplingParams.extra`)."""


@dataclass(frozen=True, slots=True, eq=False)
class Actions:
    """What is done in consecutive pixel frames: of a whole video in `ForwardBatch.family`, of one block in a stream.

    Attributes:
        keyboard: [B, P, K].
        mouse: [B, P, 2], or None for models without a mouse.
    """

    keyboard: Tensor
    mouse: Tensor | None = None

    def part(self, start: int, stop: int) -> Actions:
        """Pixel frames [start, stop)."""
        return Actions(self.keyboard[:, start:stop], None if self.mouse is None else self.mouse[:, start:stop])


class PlayableConfig(Protocol):
    """What the strategy reads of a transformer's configuration."""

    @property
    def num_frames_per_block(self) -> int: ...

    @property
    def out_channels(self) -> int: ...

    @property
    def condition_channels(self) -> int: ...

    @property
    def action(self) -> ActionConfig: ...


class PlayableTransformer(Protocol):
    """A transformer that reads actions and remembers: its forward takes `condition`, `keyboard`, `mouse`, `memory` and
    `start_frame`, and whatever the `prepare_*` methods return.
    """

    @property
    def config(self) -> PlayableConfig: ...

    def __call__(self, latents: Tensor, timestep: Tensor, **conditioning: Tree) -> Tensor: ...

    def new_memory(
        self, rows: int, latent_shape: Sequence[int], dtype: torch.dtype | None = None, devices: int = 1
    ) -> Tree:
        """Empty memory, a row-first tree, for a video or a stream of any length, of one of so many devices that share
        the heads."""
        ...

    def prepare_conditioning(self, *, image_embeds: Tensor) -> dict[str, Tree]:
        """Row-first trees that depend on the image alone."""
        ...

    def prepare_timesteps(self, timesteps: Tensor) -> dict[str, Tree]:
        """Trees with a leading axis S for the S timesteps of a run."""
        ...

    def prepare_shared(self, latent_shape: Sequence[int], start_frame: int = 0) -> dict[str, Tree]:
        """Trees that depend on shape and place of a block."""
        ...


class PlayableParts(Protocol):
    """What the strategy needs of the stage that owns it."""

    @property
    def transformer(self) -> PlayableTransformer: ...


@dataclass(slots=True, eq=False)
class Play:
    """The state of a run between blocks.

    Attributes:
        start: first latent frame of the next block.
        held: the last actions, as many as later frames still read; None before the first block.
        conditioning: row-first inputs of the block in progress, memory included.
        shared: what its rows share.
        kept: finished blocks of an offline run; None in a stream, whose caller has them.
    """

    start: int = 0
    held: Actions | None = None
    conditioning: dict[str, Tree] = field(default_factory=dict[str, Tree])
    shared: dict[str, Tree] = field(default_factory=dict[str, Tree])
    kept: list[Tensor] | None = None


class MatrixGameStrategy:
    """Few-step denoising of one block of latent frames at a time from an image and the player's actions.

    The batch brings `image_embeds` and `condition` [B, C', T, h, w] (mask and latents of the image). An offline run
    makes the T frames from the actions in `batch.family`. A stream makes as many blocks as it is given `Actions`:
    those of 1 + 4 (n - 1) pixel frames for the first block of n latent frames, 4 n for the others; beyond T the last
    condition frame is repeated (of the image nothing is seen there any more).

    After its steps a block is run once more, clean, at time `context_noise`, which leaves its keys and values in the
    memory. Noise of block i comes from `noise.fork(i)`, so a stream and an offline run make the same video; starting
    noise given in `batch.latents` is used for the frames it has.

    Args:
        parts: the transformer, usually in the denoising stage.
    """

    def __init__(self, parts: PlayableParts) -> None:
        self.parts = parts

    @property
    def config(self) -> PlayableConfig:
        """Of the transformer."""
        return self.parts.transformer.config

    # -- the run ------------------------------------------------------------------------------------------------------

    def prepare(self, batch: ForwardBatch, args: ExecutionArgs) -> StrategyState:
        """Schedule, image K/V, modulation of every step and all memory of the run.

        Raises:
            InputError: see `few_step_schedule`; guidance is asked for; the condition does not fit.
        """
        params, config, transformer = batch.params, self.config, self.parts.transformer
        if params.guidance_scale not in (None, 1.0):
            raise InputError(f"guidance_scale={params.guidance_scale}: Matrix-Game has no guidance; use 1")
        if batch.image_embeds is None or batch.condition is None:
            raise InputError("Matrix-Game starts from an image; its features or its condition latents are missing")
        shape = tuple(batch.condition.shape)
        if len(shape) != 5 or shape[1] != config.condition_channels or shape[2] < 2:
            raise InputError(
                f"condition of shape {list(shape)}: it needs {config.condition_channels} channels and at least two "
                "latent frames"
            )
        schedule = few_step_schedule(params)
        times = device_constant([*schedule.times, self._context_time(batch)], args.device)
        size = (config.out_channels, *shape[2:])
        image = transformer.prepare_conditioning(image_embeds=batch.image_embeds.to(args.device, args.dtype))
        memory = transformer.new_memory(shape[0], size, args.dtype, args.ulysses)
        noise = batch.noise or NoiseSource(batch.seeds)
        return StrategyState(
            batch=batch,
            args=args,
            latents=torch.empty(shape[0], size[0], 0, *size[2:], device=args.device),
            guidance=Guidance(),
            noise=noise,
            times=schedule.times,
            scheduler=FewStepRun(schedule, noise, args.device),
            conditioning={**image, "memory": memory},
            tables={"play": Play(), "steps": steps_of(transformer, times)},
        )

    def postprocess(self, state: StrategyState) -> ForwardBatch:
        """The blocks of an offline run into `batch.latents`."""
        kept = _play(state).kept
        if kept is not None:
            state.batch.latents = torch.cat(kept, dim=2)
        return state.batch

    def _context_time(self, batch: ForwardBatch) -> float:
        value = (batch.params.extra or {}).get(CONTEXT_NOISE, 0)
        if type(value) not in (int, float) or not 0 <= value < 1000:
            raise InputError(f"{CONTEXT_NOISE}={value!r} should be a timestep in [0, 1000)")
        return float(int(value))

    # -- blocks -------------------------------------------------------------------------------------------------------

    def block_frames(self, index: int) -> int:
        """Pixel frames of block `index`: as many actions it needs, and as many frames it becomes."""
        count, ratio = self.config.num_frames_per_block, self.config.action.vae_time_compression_ratio
        return ratio * count if index else 1 + ratio * (count - 1)

    def block_plan(self, state: StrategyState) -> BlockPlan:
        """The actions of each block.

        Raises:
            InputError: the condition's frames are no multiple of a block, or there are not enough actions.
        """
        _play(state).kept = []
        batch, size = state.batch, self.config.num_frames_per_block
        assert batch.condition is not None
        frames = batch.condition.shape[2]
        if frames % size:
            low = frames - frames % size
            near = " or ".join(str(n) for n in (low, low + size) if n)
            raise InputError(f"{frames} latent frames are no multiple of the block, {size}; nearest: {near}")
        actions = batch.family
        if not isinstance(actions, Actions):
            raise InputError("an offline run needs the actions of the whole video (Actions in ForwardBatch.family)")
        ends = [sum(self.block_frames(j) for j in range(i + 1)) for i in range(frames // size)]
        if actions.keyboard.shape[1] < ends[-1]:
            raise InputError(
                f"{frames} latent frames need actions of {ends[-1]} frames; got {actions.keyboard.shape[1]}"
            )
        starts = [0, *ends]
        return BlockPlan(tuple(actions.part(a, b) for a, b in zip(starts, ends, strict=False)))

    def init_block_context(self, state: StrategyState, item: Actions, idx: int) -> BlockContext:
        """The block's noise, its condition, and the windows of actions that its frames read.

        Raises:
            InputError: actions of another shape than the block needs.
        """
        play, batch, count = _play(state), state.batch, self.config.num_frames_per_block
        assert batch.condition is not None
        rows, _, known, height, width = batch.condition.shape
        start, stop = play.start, play.start + count
        shape = (rows, self.config.out_channels, count, height, width)
        noise = state.noise.fork(idx)
        assert isinstance(state.scheduler, FewStepRun)
        state.scheduler = FewStepRun(state.scheduler.schedule, noise, state.args.device)
        if batch.latents is not None and batch.latents.shape[2] >= stop:
            latents = batch.latents[:, :, start:stop]
        else:
            latents = noise.draw(shape[1:])
        if tuple(latents.shape) != shape:
            raise InputError(f"latents of a block have shape {list(latents.shape)}; it needs {list(shape)}")
        state.latents = to_device(latents, state.args.device, torch.float32)
        condition = batch.condition[:, :, min(start, known - 1) : stop]
        if (missing := count - condition.shape[2]) > 0:  # beyond its end the last frame is repeated
            condition = torch.cat([condition, condition[:, :, -1:].expand(-1, -1, missing, -1, -1)], 2)
        condition = to_device(condition, state.args.device, state.args.dtype)
        windows = self._windows(play, self._checked(item, rows, idx, state.args))
        play.conditioning = {**state.conditioning, "condition": condition, **windows}
        shared = self.parts.transformer.prepare_shared(shape, start)
        play.shared = {**shared, "start_frame": start}
        return BlockContext(idx)

    def _checked(self, item: Any, rows: int, idx: int, args: ExecutionArgs) -> Actions:
        """The item's actions on the device, in the compute dtype."""
        if not isinstance(item, Actions):
            raise InputError(f"a block is made from Actions; got {type(item).__name__}")
        action, count = self.config.action, self.block_frames(idx)
        if action.enable_mouse != (item.mouse is not None):
            raise InputError(f"this model is played {'with' if action.enable_mouse else 'without'} a mouse")
        for name, value, width in (
            ("keyboard", item.keyboard, action.keyboard_dim_in),
            ("mouse", item.mouse, action.mouse_dim_in),
        ):
            if value is not None and tuple(value.shape) != (rows, count, width):
                raise InputError(
                    f"{name} actions of block {idx} have shape {list(value.shape)}; it needs [{rows}, {count}, {width}]"
                )
        mouse = None if item.mouse is None else to_device(item.mouse, args.device, args.dtype)
        return Actions(to_device(item.keyboard, args.device, args.dtype), mouse)

    def _windows(self, play: Play, actions: Actions) -> dict[str, Tensor]:
        """The windows that the block's frames read; keeps of the actions what later frames will."""
        action = self.config.action
        ratio, window = action.vae_time_compression_ratio, action.window
        made: dict[str, Tensor] = {}
        held: dict[str, Tensor] = {}
        for name in ("keyboard", "mouse"):
            new: Tensor | None = getattr(actions, name)
            if new is None:
                continue
            past: Tensor | None = None if play.held is None else getattr(play.held, name)
            known = pad_actions(new, window) if past is None else torch.cat([past, new], dim=1)
            made[name] = action_windows(known, ratio, window)
            held[name] = known[:, ratio * self.config.num_frames_per_block :]
        play.held = Actions(held["keyboard"], held.get("mouse"))
        return made

    def process_block(self, state: StrategyState, ctx: BlockContext, item: Any) -> Iterator[Event]:
        """The few steps."""
        yield from ctx.steps(state.times)

    def update_context(self, state: StrategyState, ctx: BlockContext, item: Any) -> None:
        """Leave keys and values of the finished block in the memory."""
        play = _play(state)
        ctx.forward(self._rows(state, self._context_time(state.batch), len(state.times)))
        ctx.result = state.latents
        play.start += self.config.num_frames_per_block
        if play.kept is not None:
            play.kept.append(state.latents)

    # -- a step -------------------------------------------------------------------------------------------------------

    def make_model_inputs(self, state: StrategyState, t: float, step_idx: int) -> ModelInputs:
        """The block, once."""
        return self._rows(state, t, step_idx)

    def _rows(self, state: StrategyState, t: float, index: int) -> ModelInputs:
        play, latents = _play(state), state.latents.to(state.args.dtype)
        timestep = torch.full((latents.shape[0],), t, device=latents.device)
        step = state.tables["steps"][index]
        return ModelInputs(latents, timestep, (COND,), latents.shape[0], play.conditioning, play.shared, step)

    def forward(self, state: StrategyState, model_inputs: ModelInputs) -> Tensor:
        """One forward of the transformer, which writes the rows' keys and values into their memory."""
        return self.parts.transformer(model_inputs.latents, model_inputs.timestep, **model_inputs.arguments)

    def cfg_combine(self, state: StrategyState, noise_pred: Tensor) -> Tensor:
        """The prediction itself, float32."""
        return noise_pred.float()

    def scheduler_step(self, state: StrategyState, noise_pred: Tensor, t: float) -> Tensor:
        """Jump to the clean block and noise it again, with the block's own noise."""
        assert state.scheduler is not None
        return state.scheduler.step(noise_pred, state.active.index, state.latents)


def _play(state: StrategyState) -> Play:
    return state.tables["play"]
