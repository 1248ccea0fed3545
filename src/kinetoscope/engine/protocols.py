"""What the engine asks of a strategy, and the values that pass between them.

A step is rows: the strategy builds rows, the engine forwards them in groups of its choosing, the strategy combines the
predictions and steps the scheduler. Rows are branch-major: with B samples, rows [0, B) are the first branch, [B, 2B)
the second, and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from kinetoscope.core.protocols import has_any
from kinetoscope.core.types import ExecutionArgs, ForwardBatch, Noise
from kinetoscope.diffusion.guidance import Guidance, GuidanceMemory
from kinetoscope.diffusion.scheduler import ScheduleRun

Tree = Any
"""A tensor, or a tuple, list, NamedTuple or mapping of trees."""


def map_tree(change: Callable[[Tensor], Tensor], tree: Tree) -> Tree:
    """`tree` with `change` done to every tensor; what is none stays."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        return {k: map_tree(change, v) for k, v in cast(Mapping[str, Tree], tree).items()}
    if isinstance(tree, (tuple, list)):
        return _like(tree, [map_tree(change, v) for v in cast(Sequence[Tree], tree)])
    return tree


def _like(tree: Tree, parts: list[Tree]) -> Tree:
    """`parts` as a sequence of the kind of `tree`."""
    kind = cast(Any, type(tree))
    return kind(*parts) if hasattr(kind, "_fields") else kind(parts)


def take_rows(tree: Tree, rows: slice) -> Tree:
    """`tree` with every tensor cut to `rows` along its first axis (views, no copies)."""
    return map_tree(lambda x: x[rows], tree)


def split_rows(tree: Tree, count: int) -> list[Tree]:
    """What `take_rows` makes of each of the `count` rows of `tree` (views), in less time than one after another."""
    if isinstance(tree, Tensor):
        return list(tree.unsqueeze(1).unbind())
    if isinstance(tree, Mapping):
        parts = {k: split_rows(v, count) for k, v in cast(Mapping[str, Tree], tree).items()}
        return [{k: rows[i] for k, rows in parts.items()} for i in range(count)]
    if isinstance(tree, (tuple, list)):
        columns = [split_rows(v, count) for v in cast(Sequence[Tree], tree)]
        return [_like(tree, [rows[i] for rows in columns]) for i in range(count)]
    return [tree] * count


def join_rows(trees: Sequence[Tree]) -> Tree:
    """Trees of the same structure as one, every tensor joined along its first axis; what is none is the first's."""
    first = trees[0]
    if len(trees) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(list(trees))
    if isinstance(first, Mapping):
        return {k: join_rows([t[k] for t in trees]) for k in cast(Mapping[str, Tree], first)}
    if isinstance(first, (tuple, list)):
        return _like(first, [join_rows(group) for group in zip(*trees, strict=True)])
    return first


@dataclass(slots=True)
class ModelInputs:
    """The rows of one step.

    Attributes:
        latents: [R, C, T, H, W] in the dtype the network takes.
        timestep: [R], or [R, T] for one a latent frame.
        branches: the branch of each group of `batch` rows, in order; R = len(branches) * batch.
        batch: samples a branch.
        conditioning: keyword arguments of the network that are trees of row-first tensors.
        shared: keyword arguments of the network that are the same for every row of every step.
        step: keyword arguments that are the same for every row of this step: trees of tensors whose first axis is 1.
        whole: the branches of the rows that these were taken from, in order; their own where nothing was left out.
    """

    latents: Tensor
    timestep: Tensor
    branches: tuple[str, ...]
    batch: int
    conditioning: dict[str, Tree] = field(default_factory=dict[str, Tree])
    shared: dict[str, Tree] = field(default_factory=dict[str, Tree])
    step: dict[str, Tree] = field(default_factory=dict[str, Tree])
    whole: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.whole = self.whole or self.branches

    @property
    def arguments(self) -> dict[str, Tree]:
        """All keyword arguments of the network."""
        return {**self.conditioning, **self.shared, **self.step}

    def keep(self, branches: Sequence[str]) -> ModelInputs:
        """The rows of `branches`, which follow each other in these; itself where they are all."""
        found = [i for i, b in enumerate(self.branches) if b in branches]
        return self.select(found[0], found[-1] + 1)

    def select(self, start: int, stop: int) -> ModelInputs:
        """The rows of branches [start, stop), as views; itself where they are all."""
        if (start, stop) == (0, len(self.branches)):
            return self
        rows = slice(start * self.batch, stop * self.batch)
        return ModelInputs(
            self.latents[rows],
            self.timestep[rows],
            self.branches[start:stop],
            self.batch,
            {k: take_rows(v, rows) for k, v in self.conditioning.items()},
            self.shared,
            self.step,
            self.whole,
        )


@dataclass(slots=True)
class Step:
    """One step, filled in as it happens; observers read it.

    Attributes:
        index: step in the run (or in its block).
        count: steps of the run (or of its block).
        timestep: of the schedule, as a Python number.
        branches: the branches that were evaluated.
        rows: forwards the rows were executed in, as (start, stop) branch ranges.
        why: what chose these forwards.
        prediction: [R, ...] output of the network for all rows, branch-major.
        guided: [B, ...] float32 combined prediction.
        block: index of the block in a block run or stream, else None.
    """

    index: int
    count: int
    timestep: float
    branches: tuple[str, ...] = ()
    rows: tuple[tuple[int, int], ...] = ()
    why: str = ""
    prediction: Tensor | None = None
    guided: Tensor | None = None
    block: int | None = None

    def by_branch(self) -> dict[str, Tensor]:
        """branch -> [B, ...] prediction, as views."""
        if self.prediction is None:
            return {}
        return dict(zip(self.branches, self.prediction.chunk(len(self.branches)), strict=True))


@dataclass(slots=True, eq=False)
class StrategyState:
    """Everything one run owns; it dies with the run.

    Attributes:
        batch: the request.
        args: how to compute.
        latents: current sample (of the run, or of the block in progress), [B, C, T, H, W] float32.
        guidance: which rows a step needs, and how they combine.
        noise: the run's random numbers.
        memory: what guidance remembers from step to step.
        times: timesteps of the run as Python numbers, so that deciding on them never waits for the device.
        scheduler: private schedule, or None for strategies that step in closed form.
        conditioning: row-first trees for all rows of a step, branch-major.
        tables: what the strategy computed once for the run (RoPE, modulation of every step, ...).
        scratch: hook -> what that hook keeps for this run.
        step: the step in progress or last done.
    """

    batch: ForwardBatch
    args: ExecutionArgs
    latents: Tensor
    guidance: Guidance
    noise: Noise
    times: Sequence[float]
    scheduler: ScheduleRun | None = None
    conditioning: dict[str, Tree] = field(default_factory=dict[str, Tree])
    tables: dict[str, Tree] = field(default_factory=dict[str, Tree])
    scratch: dict[object, Any] = field(default_factory=dict[object, Any])
    memory: GuidanceMemory = field(default_factory=GuidanceMemory)
    step: Step | None = None

    @property
    def active(self) -> Step:
        """The step in progress; strategies read its index and branches from here."""
        if self.step is None:
            raise RuntimeError("no step is in progress")
        return self.step


@dataclass(frozen=True, slots=True)
class Event:
    """What `engine.iterate` yields.

    Attributes:
        kind: "run_start", "block_start", "step", "block_end" or "run_end".
        step: the finished step ("step" events).
        block: block index (block events, and steps inside a block).
        num_blocks: blocks of the run; None where it is unbounded or not in blocks.
        latents: "step": the sample after it; "block_end": the block's result.
        videos: which videos of the request the run makes, by index: runs that share forwards are told apart by it.
    """

    kind: str
    step: Step | None = None
    block: int | None = None
    num_blocks: int | None = None
    latents: Tensor | None = None
    videos: tuple[int, ...] = ()


@runtime_checkable
class DenoisingStrategy(Protocol):
    """How one kind of model denoises: what a row holds, how predictions combine, how the sample moves.

    Inside a step `state.active` is the step in progress (its index, and the branches that were evaluated).
    """

    def prepare(self, batch: ForwardBatch, args: ExecutionArgs) -> StrategyState:
        """Make the run's state: private scheduler, guidance, noise, times and run-constant tables."""
        ...

    def make_model_inputs(self, state: StrategyState, t: float, step_idx: int) -> ModelInputs:
        """The rows of all branches at a step; the engine leaves out those that `state.guidance` does not need."""
        ...

    def forward(self, state: StrategyState, model_inputs: ModelInputs) -> Tensor:
        """Network output [r, ...] for any subset of the rows of a step."""
        ...

    def cfg_combine(self, state: StrategyState, noise_pred: Tensor) -> Tensor:
        """One prediction [B, ...] float32 from the rows' predictions [R, ...]."""
        ...

    def scheduler_step(self, state: StrategyState, noise_pred: Tensor, t: float) -> Tensor:
        """The next sample [B, ...] float32."""
        ...

    def postprocess(self, state: StrategyState) -> ForwardBatch:
        """Put the result into the batch."""
        ...


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """The blocks of an offline run: one item each, in order.

    The strategy defines what an item is (usually a range of latent frames). A stream takes its items from the caller.
    """

    items: tuple[Any, ...]


@dataclass(slots=True)
class BlockContext:
    """One block in progress.

    Attributes:
        index: block index from 0.
        data: what the strategy keeps for the block.
        result: [B, C, t, H, W] the finished block, set by the strategy.
        steps: the engine's own step runner: `yield from ctx.steps(times)` runs the one step body for each timestep.
        forward: the engine's own forward, for passes that are no step (a clean pass that writes K/V). Both are
            attached by the engine before `process_block`.
    """

    index: int
    data: dict[str, Any] = field(default_factory=dict[str, Any])
    result: Tensor | None = None
    steps: Callable[[Sequence[float]], Iterator[Event]] = field(init=False)
    forward: Callable[[ModelInputs], Tensor] = field(init=False)


@runtime_checkable
class BlockDenoisingStrategy(DenoisingStrategy, Protocol):
    """A strategy that denoises block after block (causal models, streams, world models)."""

    def block_plan(self, state: StrategyState) -> BlockPlan:
        """The blocks of an offline run."""
        ...

    def init_block_context(self, state: StrategyState, item: Any, idx: int) -> BlockContext:
        """Set the state up for a block: its noise into `state.latents`, what else it needs into the context."""
        ...

    def process_block(self, state: StrategyState, ctx: BlockContext, item: Any) -> Iterator[Event]:
        """Denoise the block through `ctx.steps`. A generator, so that a run can pause or stop between steps."""
        ...

    def update_context(self, state: StrategyState, ctx: BlockContext, item: Any) -> None:
        """After a block: remember it (write clean K/V into a cache, keep its latents) and set `ctx.result`."""
        ...


@runtime_checkable
class PromptedStrategy(Protocol):
    """A block strategy whose prompt may change between two blocks."""

    def reprompt(self, state: StrategyState) -> None:
        """Let the blocks from now on follow the prompt embeddings that are in the batch now."""
        ...


def wanted_protocol(strategy: object) -> type:
    """Return the protocol that a strategy, or a class of them, must have: of blocks if it has any of their methods."""
    in_blocks = has_any(strategy, BlockDenoisingStrategy, DenoisingStrategy)
    return BlockDenoisingStrategy if in_blocks else DenoisingStrategy
