"""Block after block with a K/V cache (self-forcing, arXiv 2506.08009): few steps, then a pass that remembers."""

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
from kinetoscope.diffusion.guidance import Guidance
from kinetoscope.diffusion.noise import NoiseSource
from kinetoscope.engine.protocols import BlockContext, BlockPlan, Event, ModelInputs, StrategyState, Tree
from kinetoscope.engine.rows import plan_rows
from kinetoscope.engine.strategies.dmd import few_step_schedule
from kinetoscope.engine.strategies.standard import VideoTransformer, combine, conditioning_of, split_branches, steps_of

CONTEXT_NOISE, WINDOW, SINK = "context_noise", "local_attn_size", "sink_size"
"""Names under which requests set the rollout (`SamplingParams.extra`)."""


class CausalTransformer(VideoTransformer, Protocol):
    """A transformer with a cache: its forward takes `cache` and `start_frame`, and writes the frames it is given."""

    @property
    def config(self) -> Any:
        """Holds `num_frames_per_block`, `local_attn_size` (-1: all) and `independent_first_frame`."""
        ...

    def prepare_shared(self, latent_shape: Sequence[int], start_frame: int = 0) -> dict[str, Tree]:
        """Trees that depend on shape and place of a block."""
        ...

    def new_cache(self, rows: int, latent_shape: Sequence[int], frames: int | None = None, **options: Any) -> Any:
        """All memory that a video of `frames`, or a stream, will use: a row-first tree with the size `frames`."""
        ...


class CausalParts(Protocol):
    """What the strategy needs of the stage that owns it; the second transformer, if any, is the low-noise expert, which
    takes over below the timestep `boundary`."""

    @property
    def transformer(self) -> CausalTransformer: ...

    @property
    def transformer_2(self) -> CausalTransformer | None: ...

    @property
    def boundary(self) -> float: ...


@dataclass(frozen=True, slots=True)
class LatentVideo:
    """Size of the latents of a run, where no starting noise is given (`ForwardBatch.family`); frames None: a stream."""

    channels: int
    height: int
    width: int
    frames: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LatentBlock:
    """Latent frames made together, or `given` ones [B, C, frames, H, W] to remember as they are."""

    frames: int
    given: Tensor | None = None


@dataclass(slots=True, eq=False)
class Expert:
    """One network and what is its own in a run: guidance, text and cache (rows first), modulation of every timestep,
    and what the rows of the block in progress share."""

    network: CausalTransformer
    guidance: Guidance
    conditioning: dict[str, Tree]
    steps: list[dict[str, Tree]]
    shared: dict[str, Tree] = field(default_factory=dict[str, Tree])


@dataclass(slots=True, eq=False)
class Rollout:
    """A run between blocks: its experts, the branches of its rows, its size, the times of the steps and then of the
    passes over a block made and over one given, the first frame of the next block, and the finished blocks (None in a
    stream: its caller has them)."""

    experts: list[Expert]
    branches: tuple[str, ...]
    size: LatentVideo
    window: int
    times: list[float]
    start: int = 0
    kept: list[Tensor] | None = None


def block_sizes(size: int, alone: bool, given: int = 0) -> list[int]:
    """Frames of the first blocks, before the regular ones of `size`: of the given frames, and of a first frame that is
    a block of its own."""
    if given == 0:
        return [1] if alone and size > 1 else []
    if given % size == 0 and not (alone and size > 1):
        return [size] * (given // size)
    if given % size == 1:
        return [1] + [size] * (given // size)
    raise InputError(f"{given} given latent frames are not one frame and blocks of {size}")


def plan_blocks(frames: int, size: int, alone: bool, given: int = 0) -> list[int]:
    """Frames of all blocks. After a first block of one frame, frames that do not fill the last block are left out.

    Raises:
        InputError: the frames cannot be divided into blocks.
    """
    first = block_sizes(size, alone, given)
    left = frames - sum(first)
    if left < 0 or (left % size and first[:1] != [1]):
        near = [n for n in (frames - left % size, frames - left % size + size) if n >= max(sum(first), 1)]
        raise InputError(f"{frames} latent frames are no blocks of {size}; nearest: {' or '.join(map(str, near))}")
    return first + [size] * (left // size)


class CausalStrategy:
    """Few-step denoising of one block of latent frames at a time, each conditioned on all earlier ones by a K/V cache.

    The rows of a block are its frames once a branch; branches have their own rows of the cache. After its steps a block
    is run once more, clean, at time `context_noise`, which writes its keys and values. An image or a video to continue
    (`batch.condition`) is given blocks, remembered at time 0 without denoising. Of two experts each has its cache, and
    the first frame is a block of its own.

    Noise of block i comes from `noise.fork(i)`, so a stream and an offline run make the same video, unless starting
    noise [B, C, T, H, W] is given in `batch.latents`. A stream's items are `LatentBlock`s, or None for the next block.

    Args:
        parts: the transformer or the two experts, usually the denoising stage.
    """

    def __init__(self, parts: CausalParts) -> None:
        self.parts = parts

    # -- the run ------------------------------------------------------------------------------------------------------

    def prepare(self, batch: ForwardBatch, args: ExecutionArgs) -> StrategyState:
        """Text K/V, modulation of every timestep, and all memory of the run: once an expert.

        Raises:
            InputError: see `few_step_schedule`; or more latent frames than the model sees at once.
        """
        params, extra = batch.params, batch.params.extra or {}
        networks = [n for n in (self.parts.transformer, self.parts.transformer_2) if n is not None]
        schedule = few_step_schedule(params, self.parts.boundary if len(networks) > 1 else None)
        scale, rescale = params.guidance_scale or 1.0, params.guidance_rescale or 0.0
        scales = (scale, scale if params.guidance_scale_2 is None else params.guidance_scale_2)
        guidance = [Guidance.make(s, rescale, params.guidance) for _, s in zip(networks, scales, strict=False)]
        branches = max((g.branches for g in guidance), key=len)
        size, rows = _size(batch), len(branches) * batch.size
        options = {"window": extra.get(WINDOW), "sink": extra.get(SINK), "dtype": args.dtype, "devices": args.ulysses}
        times = [*schedule.times, float(int(extra.get(CONTEXT_NOISE) or 0)), 0.0]
        experts = [
            Expert(
                network,
                own,
                {
                    **conditioning_of(network, batch, args, branches),
                    "cache": network.new_cache(rows, (size.height, size.width), size.frames, **options),
                },
                steps_of(network, device_constant(times, args.device)),
            )
            for network, own in zip(networks, guidance, strict=True)
        ]
        window = networks[0].config.local_attn_size if extra.get(WINDOW) is None else extra[WINDOW]
        noise = batch.noise or NoiseSource(batch.seeds)
        return StrategyState(
            batch=batch,
            args=args,
            latents=torch.empty(batch.size, size.channels, 0, size.height, size.width, device=args.device),
            guidance=guidance[0],
            noise=noise,
            times=schedule.times,
            scheduler=FewStepRun(schedule, noise, args.device),
            tables={"rollout": Rollout(experts, branches, size, window, times)},
        )

    def reprompt(self, state: StrategyState) -> None:
        """Blocks from now on follow the batch's prompt embeddings as they are now; what was made is remembered."""
        for expert in _rollout(state).experts:
            text = conditioning_of(expert.network, state.batch, state.args, _rollout(state).branches)
            expert.conditioning = {**expert.conditioning, **text}

    def postprocess(self, state: StrategyState) -> ForwardBatch:
        """The blocks of an offline run into `batch.latents`."""
        kept = _rollout(state).kept
        if kept is not None:
            state.batch.latents = torch.cat(kept, dim=2)
        return state.batch

    # -- blocks -------------------------------------------------------------------------------------------------------

    def block_plan(self, state: StrategyState) -> BlockPlan:
        """Given blocks, then blocks of noise.

        Raises:
            InputError: the frames cannot be divided into blocks.
        """
        rollout = _rollout(state)
        if rollout.size.frames is None:
            raise InputError("an offline run needs a number of frames; for a stream use streaming_reset")
        rollout.kept = []
        size, alone, given = self._first(state)
        count = len(plan_blocks(rollout.size.frames, size, alone, given))
        return BlockPlan(tuple(self._block(state, index) for index in range(count)))

    def _first(self, state: StrategyState) -> tuple[int, bool, int]:
        """Frames of a regular block, whether the first frame is a block of its own, and given frames."""
        config, condition = self.parts.transformer.config, state.batch.condition
        alone = config.independent_first_frame or self.parts.transformer_2 is not None
        return config.num_frames_per_block, alone, 0 if condition is None else condition.shape[2]

    def _block(self, state: StrategyState, index: int) -> LatentBlock:
        """What the block of an index is made of, where nobody says otherwise."""
        size, alone, given = self._first(state)
        first, condition = block_sizes(size, alone, given), state.batch.condition
        if index >= len(first):
            return LatentBlock(size)
        start = sum(first[:index])
        return LatentBlock(
            first[index], condition if condition is None else condition[:, :, start:][:, :, : first[index]]
        )

    def init_block_context(self, state: StrategyState, item: LatentBlock | None, idx: int) -> BlockContext:
        """The block's noise, or its given latents, and its place in the video.

        Raises:
            InputError: latents of another size; a stream beyond what a model without a window sees at once.
        """
        rollout, block = _rollout(state), item or self._block(state, idx)
        start, stop = rollout.start, rollout.start + block.frames
        limit = rollout.experts[0].conditioning["cache"].frames
        if rollout.window == -1 and stop > limit:
            raise InputError(
                f"latent frame {stop} is beyond the {limit} that this model was trained to see at once; set {WINDOW} "
                "for a rolling window"
            )
        shape = (state.batch.size, rollout.size.channels, block.frames, rollout.size.height, rollout.size.width)
        noise = state.noise.fork(idx)
        latents = block.given
        if latents is None:
            whole = state.batch.latents
            latents = noise.draw(shape[1:]) if whole is None else whole[:, :, start:stop]
        if tuple(latents.shape) != shape:
            raise InputError(f"latents of a block have shape {tuple(latents.shape)}; it needs {shape}")
        state.latents = to_device(latents, state.args.device, torch.float32)
        assert isinstance(state.scheduler, FewStepRun)
        state.scheduler = FewStepRun(state.scheduler.schedule, noise, state.args.device)
        for expert in rollout.experts:
            expert.shared = {**expert.network.prepare_shared(shape, start), "start_frame": start}
        return BlockContext(idx, data={"block": block})

    def process_block(self, state: StrategyState, ctx: BlockContext, item: Any) -> Iterator[Event]:
        """The few steps; a given block has none."""
        if ctx.data["block"].given is None:
            yield from ctx.steps(state.times)

    def update_context(self, state: StrategyState, ctx: BlockContext, item: Any) -> None:
        """Write keys and values of the finished block into the caches of all branches and experts."""
        rollout, block = _rollout(state), ctx.data["block"]
        for expert in range(len(rollout.experts)):
            inputs = self._rows(state, expert, len(state.times) + (block.given is not None))
            for rows in plan_rows(inputs, state.args.cfg)[0]:
                ctx.forward(inputs.select(*rows))
        ctx.result = state.latents
        rollout.start += block.frames
        if rollout.kept is not None:
            rollout.kept.append(state.latents)

    # -- a step -------------------------------------------------------------------------------------------------------

    def make_model_inputs(self, state: StrategyState, t: float, step_idx: int) -> ModelInputs:
        """The block once for each branch, for the expert of the step."""
        expert = _expert(state, step_idx)
        state.guidance = _rollout(state).experts[expert].guidance
        return self._rows(state, expert, step_idx)

    def _rows(self, state: StrategyState, expert: int, index: int) -> ModelInputs:
        """The block once for each branch, at one of the rollout's times."""
        rollout, batch = _rollout(state), state.latents.shape[0]
        own, branches = rollout.experts[expert], rollout.branches
        latents = state.latents.to(state.args.dtype).repeat(len(branches), 1, 1, 1, 1)
        timestep = torch.full((len(latents),), rollout.times[index], device=latents.device)
        shared, step = {"expert": expert, **own.shared}, own.steps[index]
        return ModelInputs(latents, timestep, branches, batch, own.conditioning, shared, step)

    def forward(self, state: StrategyState, model_inputs: ModelInputs) -> Tensor:
        """One forward of the rows' expert; it writes their keys and values."""
        arguments = model_inputs.arguments
        expert: int = arguments.pop("expert")
        network = _rollout(state).experts[expert].network
        return network(model_inputs.latents, model_inputs.timestep, **arguments)

    def cfg_combine(self, state: StrategyState, noise_pred: Tensor) -> Tensor:
        """Classifier-free guidance in float32, by the expert's scale."""
        return combine(state, split_branches(state, noise_pred))

    def scheduler_step(self, state: StrategyState, noise_pred: Tensor, t: float) -> Tensor:
        """Jump to the clean block and noise it again, with the block's own noise."""
        assert state.scheduler is not None
        return state.scheduler.step(noise_pred, state.active.index, state.latents)


def _rollout(state: StrategyState) -> Rollout:
    return state.tables["rollout"]


def _expert(state: StrategyState, index: int) -> int:
    assert isinstance(state.scheduler, FewStepRun)
    return state.scheduler.schedule.expert(index)


def _size(batch: ForwardBatch) -> LatentVideo:
    if batch.latents is not None:
        _, channels, frames, height, width = batch.latents.shape
        return LatentVideo(channels, height, width, frames)
    if not isinstance(batch.family, LatentVideo):
        raise InputError("a causal run needs starting latents, or its size as LatentVideo in batch.family")
    return batch.family
