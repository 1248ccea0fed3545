"""Small strategies and parts that record what the engine does with them."""

from __future__ import annotations

from typing import Any

import torch

from kinetoscope.core.types import ExecutionArgs, ForwardBatch, SamplingParams
from kinetoscope.diffusion.guidance import Guidance
from kinetoscope.diffusion.noise import NoiseSource
from kinetoscope.engine.hooks.base import Hook, Interceptor
from kinetoscope.engine.protocols import BlockContext, BlockPlan, ModelInputs, StrategyState


def make_batch(samples: int = 1, seed: int = 0) -> ForwardBatch:
    params = SamplingParams(height=16, width=16, num_frames=5, fps=8, num_inference_steps=4, guidance_scale=3.0)
    return ForwardBatch(params, ["p"] * samples, [""] * samples, [seed] * samples)


class FakeStrategy:
    """Denoises x by x - 0.1 guided; the network returns row value + branch number, and logs each call."""

    def __init__(self, log: list[Any], steps: int = 3, scale: float = 2.0, fail_at: int | None = None) -> None:
        self.log, self.steps, self.scale, self.fail_at = log, steps, scale, fail_at

    def prepare(self, batch: ForwardBatch, args: ExecutionArgs) -> StrategyState:
        noise = NoiseSource(batch.seeds)
        times = [float(1000 - 100 * i) for i in range(self.steps)]
        latents = noise.draw((1, 2, 2, 2))
        return StrategyState(batch, args, latents, Guidance(self.scale), noise, times)

    def make_model_inputs(self, state: StrategyState, t: float, step_idx: int) -> ModelInputs:
        branches = state.guidance.branches
        batch = state.latents.shape[0]
        rows = len(branches) * batch
        kinds = torch.arange(len(branches)).repeat_interleave(batch).float()
        return ModelInputs(
            state.latents.repeat(len(branches), 1, 1, 1, 1),
            torch.full((rows,), t),
            branches,
            batch,
            {"kind": (kinds,)},
        )

    def forward(self, state: StrategyState, model_inputs: ModelInputs) -> torch.Tensor:
        self.log.append(("forward", model_inputs.branches))
        if self.fail_at is not None and state.active.index == self.fail_at:
            raise ValueError("the network broke")
        return model_inputs.latents + model_inputs.conditioning["kind"][0].view(-1, 1, 1, 1, 1)

    def cfg_combine(self, state: StrategyState, noise_pred: torch.Tensor) -> torch.Tensor:
        branches = state.active.branches
        return state.guidance.combine(dict(zip(branches, noise_pred.chunk(len(branches)), strict=True)))

    def scheduler_step(self, state: StrategyState, noise_pred: torch.Tensor, t: float) -> torch.Tensor:
        return state.latents - 0.1 * noise_pred

    def postprocess(self, state: StrategyState) -> ForwardBatch:
        state.batch.latents = state.latents
        return state.batch


class FakeBlockStrategy(FakeStrategy):
    """Each item is an integer; a block is its own noise denoised, plus the mean of what the run remembers."""

    def prepare(self, batch: ForwardBatch, args: ExecutionArgs) -> StrategyState:
        state = super().prepare(batch, args)
        state.tables["memory"] = []
        return state

    def block_plan(self, state: StrategyState) -> BlockPlan:
        return BlockPlan(tuple(range(3)))

    def init_block_context(self, state: StrategyState, item: int, idx: int) -> BlockContext:
        self.log.append(("init", item))
        state.latents = state.noise.fork(item).draw((1, 2, 2, 2))
        for past in state.tables["memory"]:
            state.latents = state.latents + 0.1 * past
        return BlockContext(idx)

    def process_block(self, state: StrategyState, ctx: BlockContext, item: int):
        yield from ctx.steps(state.times)

    def update_context(self, state: StrategyState, ctx: BlockContext, item: int) -> None:
        self.log.append(("update", item))
        clean = ctx.forward(self.make_model_inputs(state, 0.0, 0).select(1, 2))
        state.tables["memory"].append(clean)
        ctx.result = state.latents

    def postprocess(self, state: StrategyState) -> ForwardBatch:
        state.batch.latents = torch.cat(state.tables["memory"], dim=2) if state.tables["memory"] else None
        return state.batch


class RecordingHook(Hook):
    """Writes the order in which it is called."""

    name = "recording"

    def __init__(self, log: list[Any], name: str = "recording", order: int = 100) -> None:
        self.log = log
        self.name = name  # pyright: ignore[reportAttributeAccessIssue]
        self.order = order  # pyright: ignore[reportAttributeAccessIssue]

    def on_run_start(self, state: StrategyState) -> None:
        self.log.append((self.name, "run_start"))

    def on_run_end(self, state: StrategyState, error: BaseException | None) -> None:
        self.log.append((self.name, "run_end", type(error).__name__ if error else None))

    def on_block_start(self, state: StrategyState, context: BlockContext) -> None:
        self.log.append((self.name, "block_start", context.index))

    def on_block_end(self, state: StrategyState, context: BlockContext) -> None:
        self.log.append((self.name, "block_end", context.index))

    def on_step_start(self, state: StrategyState, step: Any) -> None:
        self.log.append((self.name, "step_start", step.index))

    def on_step_end(self, state: StrategyState, step: Any) -> None:
        self.log.append((self.name, "step_end", step.index))


class DoublingInterceptor(Interceptor):
    """Doubles what the layers below return."""

    name = "doubling"

    def around_forward(self, call: Any, state: StrategyState, inputs: ModelInputs) -> torch.Tensor:
        return 2 * call(state, inputs)


class AddingInterceptor(Interceptor):
    """Adds one to what the layers below return."""

    name = "adding"
    order = 200

    def around_forward(self, call: Any, state: StrategyState, inputs: ModelInputs) -> torch.Tensor:
        return call(state, inputs) + 1
