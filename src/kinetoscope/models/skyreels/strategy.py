"""Diffusion forcing: every latent frame of a window has its own timestep; long videos are windows that overlap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kinetoscope.core.transfer import to_device
from kinetoscope.core.types import ExecutionArgs, ForwardBatch
from kinetoscope.diffusion.scheduler import ScheduleRun
from kinetoscope.engine.protocols import BlockContext, BlockPlan, Event, ModelInputs, StrategyState, split_rows
from kinetoscope.engine.strategies.standard import StandardStrategy, noise_of
from kinetoscope.models.skyreels.forcing import (
    ForcingPlan,
    frames_timesteps,
    groups_that_move_together,
    moving_frames,
    step_matrix,
)

NOISE_PER_TIMESTEP = 0.001
"""Noise mixed into frames taken over, for each unit of the timestep that the network is told for them."""


@dataclass(frozen=True, slots=True)
class ForcingInputs:
    """What a diffusion-forcing request carries beside the common fields (`ForwardBatch.family`).

    Attributes:
        plan: its parameters in latent frames.
        end: [B, C, 1, h, w] clean latents of a last image, or None.
    """

    plan: ForcingPlan
    end: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Window:
    """One window in progress.

    Attributes:
        times: timestep of each iteration as a Python number: that of the first frame that moves.
        timesteps: [S, T] what the network is told for each frame in each iteration.
        taken: steps each frame has taken after each iteration, as Python numbers.
        moving: whether each frame takes a step in each iteration.
        runs: neighbouring frames that move together, and their private scheduler.
        kept: frames at the start that came clean.
        modulation: of each iteration.
    """

    times: list[float]
    timesteps: Tensor
    taken: list[list[int]]
    moving: list[list[bool]]
    runs: list[tuple[Sequence[int], ScheduleRun]]
    kept: int
    modulation: list[dict[str, Any]]


class ForcingStrategy(StandardStrategy):
    """A block is a window: its frames go from noise to clean each on its own schedule.

    The first window starts from `batch.latents`, with `batch.condition` [B, C, k, h, w] (an image, or the end of a
    given video) as its first frames; later windows from further noise, with the last frames of the video so far in
    front.
    """

    def prepare(self, batch: ForwardBatch, args: ExecutionArgs) -> StrategyState:
        """Guidance and text; schedules are made for each window."""
        assert batch.latents is not None
        guidance = self.make_guidance(batch)
        return StrategyState(
            batch=batch,
            args=args,
            latents=to_device(batch.latents, args.device, torch.float32),
            guidance=guidance,
            noise=noise_of(batch),
            times=(),
            conditioning=self.prepare_conditioning(batch, args, guidance.branches),
        )

    def start_schedule(self, batch: ForwardBatch, args: ExecutionArgs) -> ScheduleRun:
        """A private run of the whole schedule: a given video is continued, so `strength` has no meaning."""
        params = batch.params
        assert params.num_inference_steps is not None
        prototype = self.parts.scheduler.override(params.scheduler, params.flow_shift)
        return prototype.start(params.num_inference_steps, args.device, noise=noise_of(batch))

    # -- windows -------------------------------------------------------------------------------------------------------

    def block_plan(self, state: StrategyState) -> BlockPlan:
        """One item a window: its latent frames."""
        return BlockPlan(_inputs(state).plan.windows)

    def init_block_context(self, state: StrategyState, item: int, idx: int) -> BlockContext:
        """Noise of the window with what is given in front of it (and behind), and its schedules."""
        plan, end = _inputs(state).plan, _inputs(state).end
        given = state.batch.condition
        if idx > 0:
            _, channels, _, *size = state.latents.shape
            given = state.tables["video"][:, :, -plan.overlap :]
            given = given[:, :, : plan.overlap - plan.overlap % plan.block]
            state.latents = to_device(state.noise.draw((channels, item, *size)), state.args.device)
        kept = 0 if given is None else given.shape[2]
        parts = [state.latents[:, :, kept:]]
        if given is not None:
            parts.insert(0, given.to(state.latents))
        if end is not None:
            parts.append(end.to(state.latents))
        state.latents = torch.cat(parts, dim=2)
        state.tables["window"] = self._window(state, kept, ends=0 if end is None else end.shape[2])
        frames_per_block: Any = {"frames_per_block": plan.block}
        state.tables["shared"] = self.parts.transformer.prepare_shared(state.latents.shape, **frames_per_block)
        return BlockContext(idx)

    def process_block(self, state: StrategyState, ctx: BlockContext, item: int) -> Iterator[Event]:
        """One step an iteration."""
        window: Window = state.tables["window"]
        yield from ctx.steps(window.times)

    def update_context(self, state: StrategyState, ctx: BlockContext, item: int) -> None:
        """The window's new frames join the video."""
        new = state.latents[:, :, :item]
        if ctx.index > 0:
            new = new[:, :, _inputs(state).plan.overlap :]
        ctx.result = new
        state.tables["video"] = torch.cat([state.tables["video"], new], dim=2) if ctx.index > 0 else new

    def postprocess(self, state: StrategyState) -> ForwardBatch:
        """The video so far into `batch.latents`."""
        state.batch.latents = state.tables.get("video", state.latents)
        return state.batch

    # -- steps ---------------------------------------------------------------------------------------------------------

    def make_model_inputs(self, state: StrategyState, t: float, step_idx: int) -> ModelInputs:
        """The window once for each branch; frames that came clean may be noised a little, the same for all branches."""
        window: Window = state.tables["window"]
        branches, latents = state.guidance.branches, state.latents
        share = NOISE_PER_TIMESTEP * _inputs(state).plan.noised
        if share and window.kept:
            clean = latents[:, :, : window.kept]
            noise = to_device(state.noise.draw(clean.shape[1:]), clean.device)
            latents = torch.cat([clean * (1 - share) + noise * share, latents[:, :, window.kept :]], dim=2)
        latents = latents.to(state.args.dtype).repeat(len(branches), 1, 1, 1, 1)
        timestep = window.timesteps[step_idx].expand(len(latents), -1)
        step = window.modulation[step_idx]
        batch, shared = state.latents.shape[0], state.tables["shared"]
        return ModelInputs(latents, timestep, branches, batch, state.conditioning, shared, step)

    def scheduler_step(self, state: StrategyState, noise_pred: Tensor, t: float) -> Tensor:
        """One step of each frame that moves in this iteration, by the scheduler of its run of frames."""
        window: Window = state.tables["window"]
        index = state.active.index
        latents = state.latents.clone()
        for frames, scheduler in window.runs:
            if window.moving[index][frames[0]]:
                part = slice(frames[0], frames[-1] + 1)
                step = window.taken[index][frames[0]] - 1
                latents[:, :, part] = scheduler.step(noise_pred[:, :, part], step, latents[:, :, part])
        return latents

    def _window(self, state: StrategyState, kept: int, ends: int) -> Window:
        """Schedules of a window of the length of `state.latents`."""
        batch, device = state.batch, state.args.device
        plan, frames = _inputs(state).plan, state.latents.shape[2]
        schedule = self.start_schedule(batch, state.args)
        steps = len(schedule)
        matrix = step_matrix(frames, steps, ready=kept, block=plan.block, ar_step=plan.ar_step)
        moving = moving_frames(matrix, steps)
        if ends:
            matrix[:, -ends:] = steps + 1
            moving[:, -ends:] = False
        matrix, moving = matrix[moving.any(1)], moving[moving.any(1)]
        timesteps = frames_timesteps(matrix, schedule.times)
        if plan.noised and kept:
            timesteps[:, :kept] = int(plan.noised)
        runs = [(frames, self.start_schedule(batch, state.args)) for frames in groups_that_move_together(matrix)]
        moves: list[list[bool]] = moving.tolist()
        times = [float(told[moving.index(True)]) for told, moving in zip(timesteps.tolist(), moves, strict=True)]
        timesteps = to_device(timesteps, device)
        fps: Any = {"fps": batch.params.fps}
        modulation = split_rows(self.parts.transformer.prepare_timesteps(timesteps, **fps), len(timesteps))
        return Window(times, timesteps, matrix.tolist(), moves, runs, kept, modulation)


def _inputs(state: StrategyState) -> ForcingInputs:
    inputs = state.batch.family
    assert isinstance(inputs, ForcingInputs)
    return inputs
