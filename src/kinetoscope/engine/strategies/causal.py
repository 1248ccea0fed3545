"""Block after block with a K/V cache (self-forcing, arXiv 2506.08009): few steps, then a pass that remembers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from kinetoscope.core.errors import InputError
from kinetoscope.core.types import ExecutionArgs, ForwardBatch, Noise
from kinetoscope.diffusion.few_step import FewStepSchedule
from kinetoscope.diffusion.guidance import Guidance
from kinetoscope.diffusion.noise import NoiseSource
from kinetoscope.engine.protocols import BlockContext, BlockPlan, Event, ModelInputs, StrategyState, Tree
from kinetoscope.engine.rows import plan_rows
from kinetoscope.engine.strategies.dmd import DMDStrategy, jump, schedule_of
from kinetoscope.engine.strategies.standard import VideoTransformer, conditioning_of, split_branches

CONTEXT_NOISE, WINDOW, SINK = "context_noise", "local_attn_size", "sink_size"
"""Names under which requests set the rollout (`SamplingParams.extra`)."""


class CausalConfig(Protocol):
    """What a rollout reads of a causal transformer's configuration; frames are latent frames."""

    @property
    def num_frames_per_block(self) -> int: ...

    @property
    def local_attn_size(self) -> int: ...

    @property
    def independent_first_frame(self) -> bool: ...


class KeyValueCache(Protocol):
    """Memory of past frames, a row-first tree; a transformer's forward reads it and writes the frames it is given."""

    @property
    def frames(self) -> int: ...


class CausalTransformer(VideoTransformer, Protocol):
    """A transformer with a cache: its forward takes `cache` and `start_frame`."""

    @property
    def config(self) -> CausalConfig: ...

    def prepare_shared(self, latent_shape: Sequence[int], start_frame: int = 0) -> dict[str, Tree]:
        """Trees that depend on shape and place of a block."""
        ...

    def new_cache(
        self,
        rows: int,
        latent_shape: Sequence[int],
        frames: int | None = None,
        *,
        window: int | None = None,
        sink: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> KeyValueCache:
        """All memory that a video of `frames`, or a stream, will use."""
        ...


class CausalParts(Protocol):
    """What the strategy needs of the stage that owns it."""

    @property
    def transformer(self) -> CausalTransformer: ...

    @property
    def transformer_2(self) -> CausalTransformer | None: ...


@dataclass(frozen=True, slots=True)
class LatentVideo:
    """Size of the video of a run, where no starting noise is given (`ForwardBatch.family`).

    Attributes:
        channels, height, width: of the latents.
        frames: latent frames; None: a stream.
    """

    channels: int
    height: int
    width: int
    frames: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LatentBlock:
    """What a block is made of.

    Attributes:
        frames: latent frames.
        given: [B, C, frames, H, W] clean latents to remember as they are, instead of denoising.
    """

    frames: int
    given: Tensor | None = None


@dataclass(slots=True, eq=False)
class Rollout:
    """The state of a run between blocks.

    Attributes:
        schedule: of every block.
        guidance: of each expert.
        conditioning: of each expert, its cache included; rows first.
        size: channels, height and width.
        window: latent frames attended to, -1: all.
        start: first frame of the next block.
        noise: random numbers of the block in progress.
        shared: what all rows of the block in progress share, for each expert.
        kept: finished blocks of an offline run; None in a stream, whose caller has them.
    """

    schedule: FewStepSchedule
    guidance: list[Guidance]
    conditioning: list[dict[str, Tree]]
    size: tuple[int, int, int]
    window: int
    start: int = 0
    noise: Noise | None = None
    shared: list[dict[str, Tree]] = field(default_factory=list[dict[str, Tree]])
    kept: list[Tensor] | None = None


class CausalStrategy(DMDStrategy):
    """Few-step denoising of one block of latent frames at a time, each conditioned on all earlier ones by a K/V cache.

    The rows of a block are its frames once a branch; branches have their own part of the cache. After its steps a block
    is run once more, clean, at time `context_noise`, which writes its keys and values. An image or a video to continue
    (`batch.condition`) is given blocks, remembered at time 0 without denoising. With two experts each has its cache,
    and the first frame is a block of its own.

    Noise of block i comes from `noise.fork(i)`, so a stream and an offline run make the same video, unless starting
    noise [B, C, T, H, W] is given in `batch.latents`. A stream's items are `LatentBlock`s, or None for the next block.

    Args:
        parts: the transformer or the two experts, usually the denoising stage.
    """

    parts: CausalParts  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, parts: CausalParts) -> None:
        super().__init__(parts)

    @property
    def config(self) -> CausalConfig:
        """Of the transformer."""
        return self.parts.transformer.config

    # -- the run ------------------------------------------------------------------------------------------------------

    def prepare(self, batch: ForwardBatch, args: ExecutionArgs) -> StrategyState:
        """Schedule, text K/V and modulation of every step, and all memory of the run: once an expert.

        Raises:
            InputError: see `schedule_of`; or more latent frames than the model sees at once.
        """
        params, experts = batch.params, self._networks()
        schedule = schedule_of(params, len(experts))
        scale = params.guidance_scale or 1.0
        guidance = [Guidance(scale, params.guidance_rescale or 0.0)]
        guidance += [Guidance(params.guidance_scale_2 or scale, params.guidance_rescale or 0.0)] * (len(experts) - 1)
        widest = max(guidance, key=lambda g: len(g.branches))
        extra = params.extra or {}
        clean = _context_time(batch)
        times = torch.tensor([*schedule.times, clean, 0.0], device=args.device)
        video = _size(batch)
        window = extra.get(WINDOW)
        conditioning: list[dict[str, Tree]] = []
        for expert in experts:
            cache = expert.new_cache(
                len(widest.branches) * batch.size,
                (video.channels, video.height, video.width),
                video.frames,
                window=window,
                sink=extra.get(SINK),
                dtype=args.dtype,
            )
            conditioning.append({**conditioning_of(expert, batch, args, widest.branches), "cache": cache})
        rollout = Rollout(
            schedule,
            guidance,
            conditioning,
            (video.channels, video.height, video.width),
            self.config.local_attn_size if window is None else window,
        )
        return StrategyState(
            batch=batch,
            args=args,
            latents=torch.empty(batch.size, video.channels, 0, video.height, video.width, device=args.device),
            guidance=widest,
            noise=batch.noise or NoiseSource(batch.seeds),
            times=schedule.times,
            conditioning=conditioning[0],
            tables={"rollout": rollout, "steps": [e.prepare_timesteps(times) for e in experts]},
        )

    def postprocess(self, state: StrategyState) -> ForwardBatch:
        """The blocks of an offline run into `batch.latents`."""
        kept = _rollout(state).kept
        if kept is not None:
            state.batch.latents = torch.cat(kept, dim=2)
        return state.batch

    def _networks(self) -> list[CausalTransformer]:
        second = self.parts.transformer_2
        return [self.parts.transformer] if second is None else [self.parts.transformer, second]

    # -- blocks -------------------------------------------------------------------------------------------------------

    def block_plan(self, state: StrategyState) -> BlockPlan:
        """Given blocks, then blocks of noise.

        Where the first frame is a block of its own, frames that do not fill the last block are left out.

        Raises:
            InputError: the frames cannot be divided into blocks.
        """
        _rollout(state).kept = []
        frames = _size(state.batch).frames
        if frames is None:
            raise InputError("an offline run needs a number of frames; for a stream use streaming_reset")
        blocks = self._first_blocks(state)
        size, left = self.config.num_frames_per_block, frames - sum(b.frames for b in blocks)
        if left < 0:
            raise InputError(f"{frames} latent frames are fewer than the first blocks need")
        if left % size and not blocks:
            low = frames - left % size
            near = " or ".join(str(n) for n in (low, low + size) if n)
            raise InputError(f"{frames} latent frames are no multiple of the block, {size}; nearest: {near}")
        return BlockPlan((*blocks, *[LatentBlock(size)] * (left // size)))

    def _first_blocks(self, state: StrategyState) -> list[LatentBlock]:
        """What comes before the regular blocks: given frames, or a first frame of its own."""
        size, condition = self.config.num_frames_per_block, state.batch.condition
        alone = self.config.independent_first_frame or self.parts.transformer_2 is not None
        if condition is None:
            return [LatentBlock(1)] if alone and size > 1 else []
        frames = condition.shape[2]
        if frames % size == 0 and not alone:
            sizes = [size] * (frames // size)
        elif frames % size == 1 % size:
            sizes = [1] + [size] * (frames // size - (size == 1))
        else:
            raise InputError(f"{frames} given latent frames are not one frame and blocks of {size}")
        ends = list(accumulate(sizes))
        return [LatentBlock(n, condition[:, :, end - n : end]) for n, end in zip(sizes, ends, strict=True)]

    def init_block_context(self, state: StrategyState, item: LatentBlock | None, idx: int) -> BlockContext:
        """The block's noise, or its given latents, and its place in the video.

        Raises:
            InputError: given latents of another size; a stream beyond what a model without a window sees at once.
        """
        rollout = _rollout(state)
        block = item or self._next_block(state, idx)
        channels, height, width = rollout.size
        start, stop = rollout.start, rollout.start + block.frames
        cache: KeyValueCache = rollout.conditioning[0]["cache"]
        if rollout.window == -1 and stop > cache.frames:
            raise InputError(
                f"latent frame {stop} is beyond the {cache.frames} that this model was trained to see at once; set "
                f"{WINDOW} for a rolling window"
            )
        shape = (state.batch.size, channels, block.frames, height, width)
        rollout.noise = state.noise.fork(idx)
        if block.given is not None:
            latents = block.given
        elif state.batch.latents is not None:
            latents = state.batch.latents[:, :, start:stop]
        else:
            latents = rollout.noise.draw(shape[1:])
        if tuple(latents.shape) != shape:
            raise InputError(f"latents of a block have shape {tuple(latents.shape)}; it needs {shape}")
        state.latents = latents.to(state.args.device, torch.float32)
        rollout.shared = [{**e.prepare_shared(shape, start), "start_frame": start} for e in self._networks()]
        return BlockContext(idx, data={"block": block})

    def _next_block(self, state: StrategyState, idx: int) -> LatentBlock:
        first = self._first_blocks(state) if idx == 0 or state.batch.condition is not None else []
        return first[idx] if idx < len(first) else LatentBlock(self.config.num_frames_per_block)

    def process_block(self, state: StrategyState, ctx: BlockContext, item: Any) -> Iterator[Event]:
        """The few steps; a given block has none."""
        block: LatentBlock = ctx.data["block"]
        if block.given is None:
            yield from ctx.steps(_rollout(state).schedule.times)

    def update_context(self, state: StrategyState, ctx: BlockContext, item: Any) -> None:
        """Write keys and values of the finished block into the caches of all branches and experts."""
        rollout, block = _rollout(state), ctx.data["block"]
        entry = len(rollout.schedule) + (block.given is not None)
        clean = _context_time(state.batch) if block.given is None else 0.0
        for expert in range(len(rollout.conditioning)):
            inputs = self._block_rows(state, expert, clean, entry)
            for rows in plan_rows(inputs, state.args.cfg):
                ctx.forward(inputs.select(*rows))
        ctx.result = state.latents
        rollout.start += block.frames
        if rollout.kept is not None:
            rollout.kept.append(state.latents)

    # -- a step -------------------------------------------------------------------------------------------------------

    def make_model_inputs(self, state: StrategyState, t: float, step_idx: int) -> ModelInputs:
        """The block once for each branch, for the expert of the step."""
        return self._block_rows(state, _rollout(state).schedule.expert(step_idx), t, step_idx)

    def _block_rows(self, state: StrategyState, expert: int, t: float, index: int) -> ModelInputs:
        rollout = _rollout(state)
        return self.rows(state, expert, t, index, rollout.conditioning[expert], rollout.shared[expert])

    def cfg_combine(self, state: StrategyState, noise_pred: Tensor) -> Tensor:
        """Classifier-free guidance in float32, by the expert's scale."""
        rollout = _rollout(state)
        guidance = rollout.guidance[rollout.schedule.expert(state.active.index)]
        return guidance.combine(split_branches(state, noise_pred))

    def scheduler_step(self, state: StrategyState, noise_pred: Tensor, t: float) -> Tensor:
        """Jump and noise, float32 (the jump in float64), with the block's own noise."""
        rollout = _rollout(state)
        assert rollout.noise is not None
        return jump(state, rollout.schedule, rollout.noise, noise_pred)


def _rollout(state: StrategyState) -> Rollout:
    return state.tables["rollout"]


def _context_time(batch: ForwardBatch) -> float:
    """When a finished block is remembered, a whole timestep."""
    return float(int((batch.params.extra or {}).get(CONTEXT_NOISE) or 0))


def _size(batch: ForwardBatch) -> LatentVideo:
    if batch.latents is not None:
        _, channels, frames, height, width = batch.latents.shape
        return LatentVideo(channels, height, width, frames)
    if not isinstance(batch.family, LatentVideo):
        raise InputError("a causal run needs starting latents, or its size as LatentVideo in batch.family")
    return batch.family
