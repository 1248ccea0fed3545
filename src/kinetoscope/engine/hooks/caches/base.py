"""What all step caches share: whose memory is whose, running some rows and estimating others, and what was done.

A cache stands in for the loop over a transformer's blocks (`nn.stack`). The first blocks always run, and so do the
last; of those between, a *row* (one branch of one sample) may keep what they added the last time they ran. Each row
decides for itself, from its own data and the step alone: so a video is the same alone and in a batch, and the branches
of guidance are the same in one forward and in two.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from kinetoscope.core.context import StepInfo, current_context, with_stack
from kinetoscope.core.errors import CompositionError
from kinetoscope.core.transfer import as_floats
from kinetoscope.engine.hooks.base import Forward, Interceptor
from kinetoscope.engine.hooks.caches.rows import can_cut, cut_calls, join, tokens_of, with_tokens
from kinetoscope.engine.hooks.notes import note
from kinetoscope.engine.protocols import BlockContext, ModelInputs, StrategyState
from kinetoscope.nn.stack import BlockCall, Hidden, join_tokens, run_calls

CACHES = frozenset({"teacache", "fbcache", "dbcache", "taylorseer", "magcache"})
"""Names of all step caches: at most one of them is on an engine."""


@dataclass(slots=True)
class Row:
    """What a cache remembers of one branch of one sample.

    Attributes:
        seen: the last step that it was evaluated in; -1: none yet.
        filled: the last step in which its blocks really ran; -1: none yet.
    """

    seen: int = -1
    filled: int = -1


class Decision(NamedTuple):
    """Whether a row's blocks are left out, and the number that was compared to decide it (None: nothing was)."""

    skip: bool
    score: float | None = None


class Look(NamedTuple):
    """What a decision may look at; rows first.

    Attributes:
        step: the step.
        branches: the branch of each row.
        before: [R, N, d] tokens that enter the blocks.
        probe: [R, N, d] tokens after the first blocks that always run.
        calls: all blocks with their arguments.
    """

    step: StepInfo
    branches: Sequence[str]
    before: Hidden
    probe: Hidden
    calls: Sequence[BlockCall]


@dataclass(slots=True)
class CacheRun:
    """A cache's memory of one run: the network it is of, its rows by (branch, sample), and how its output is divided
    into streams."""

    network: object = None
    rows: dict[tuple[str, int], Any] = field(default_factory=dict[tuple[str, int], Any])
    streams: tuple[int, ...] | None = None


class StepCache(Interceptor, ABC):
    """Leaves out blocks of steps that would add about what they added before; a subclass says when, and what instead.

    Lossy. All memory is in the run, so runs interleave; it is dropped at the start of a block, when another expert
    takes over, and for a row that was not evaluated in the step before (guidance that pauses). A pass that is no step,
    such as the one that fills a K/V cache, always runs.

    Class attributes:
        settings: what a user may set -> the type it has.
        row: the kind of memory a row has.
        counts_steps: it decides or estimates by the number of a step, so that each step should be at a lower level.
    """

    order: ClassVar[int] = 150
    settings: ClassVar[Mapping[str, type]] = {}
    row: ClassVar[type[Row]] = Row
    counts_steps: ClassVar[bool] = False
    first: int = 0  # blocks that always run, at the start and at the end of the stack
    last: int = 0

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.name in CACHES:
            cls.conflicts = CACHES - {cls.name}

    # -- for subclasses -----------------------------------------------------------------------------------------------

    @abstractmethod
    def decide(self, rows: Sequence[Any], look: Look) -> list[Decision]:
        """One decision a row; a row whose blocks never ran is run whatever is decided."""

    @abstractmethod
    def store(self, row: Any, look: Look, before: Tensor, after: Tensor) -> None:
        """Remember a row [1, N, d] before and after the blocks that may be left out."""

    @abstractmethod
    def estimate(self, row: Any, look: Look, before: Tensor) -> Tensor:
        """What the blocks would make of a row `before` [1, N, d]."""

    def check(self, blocks: int) -> None:
        """Refuse a network of so few blocks that there is none to leave out.

        Raises:
            CompositionError: the blocks that always run are all of them.
        """
        if self.first + self.last >= blocks:
            raise CompositionError(
                f"{self.name}: first={self.first} and last={self.last} leave none of the {blocks} blocks to skip"
            )

    # -- the run ------------------------------------------------------------------------------------------------------

    def on_run_start(self, state: StrategyState) -> None:
        """An empty memory.

        Raises:
            CompositionError: the cache counts steps, and the solver evaluates the network several times a step.
        """
        run = state.scheduler
        if self.counts_steps and run is not None and len(run.starts) < len(run):
            raise CompositionError(
                f"cache={self.name!r} and scheduler={run.name!r} cannot be used together: the cache counts steps as if "
                "each were at a lower noise level, and this solver evaluates some levels twice; use fbcache or teacache"
            )
        state.scratch[self] = CacheRun()
        state.batch.logging_info["step_cache"] = {"name": self.name, "rows": 0, "skipped": 0}

    def on_block_start(self, state: StrategyState, context: BlockContext) -> None:
        """Forget: another block's tokens are other tokens."""
        state.scratch[self] = CacheRun()

    def around_forward(self, call: Forward, state: StrategyState, inputs: ModelInputs) -> Tensor:
        """The forward, with this cache in the place of the loop over blocks."""
        keys = [(branch, sample) for branch in inputs.branches for sample in range(inputs.batch)]

        def stack(x: Hidden, calls: Sequence[BlockCall]) -> Hidden:
            context = current_context()
            if context is None or context.step is None:
                return run_calls(x, calls)
            return self._stack(state, keys, context.step, x, calls)

        with with_stack(stack):
            return call(state, inputs)

    def _stack(
        self,
        state: StrategyState,
        keys: Sequence[tuple[str, int]],
        step: StepInfo,
        x: Hidden,
        calls: Sequence[BlockCall],
    ) -> Hidden:
        """The tokens after all blocks, some of them estimated."""
        layers = [i for i, call in enumerate(calls) if call.block is not join_tokens]
        self.check(len(layers))
        start = layers[self.first - 1] + 1 if self.first else 0
        end = layers[-self.last] if self.last else len(calls)
        run: CacheRun = state.scratch[self]
        rows = self._rows(run, keys, step, calls)
        probe = run_calls(x, calls[:start])
        look = Look(step, [branch for branch, _ in keys], x, probe, calls)
        decisions = [
            Decision(d.skip and row.filled >= 0, d.score) for row, d in zip(rows, self.decide(rows, look), strict=True)
        ]
        middle = self._middle(run, rows, decisions, look, calls[start:end], start)
        for row in rows:
            row.seen = step.index
        self._tell(state, keys, decisions)
        return run_calls(middle, calls[end:], first=end)

    def _rows(
        self, run: CacheRun, keys: Sequence[tuple[str, int]], step: StepInfo, calls: Sequence[BlockCall]
    ) -> list[Any]:
        """The memory of each row; empty where it is of another network, or not of the step before."""
        network = calls[0].block  # an expert is known by its first block
        if run.network != network:
            run.network, run.rows = network, {}
        for key in keys:
            known = run.rows.get(key)
            if known is None or known.seen != step.index - 1:
                run.rows[key] = self.row()
        return [run.rows[key] for key in keys]

    def _middle(
        self,
        run: CacheRun,
        rows: Sequence[Any],
        decisions: Sequence[Decision],
        look: Look,
        calls: Sequence[BlockCall],
        start: int,
    ) -> Hidden:
        """The tokens after `calls`, which begin at number `start`: run for some rows, estimated for the others."""
        before = tokens_of(look.probe)
        runs = [i for i, d in enumerate(decisions) if not d.skip]
        pieces: dict[int, Tensor] = {}
        if runs:
            chosen = runs if len(runs) < len(rows) and can_cut(calls, len(rows)) else list(range(len(rows)))
            x, cut = cut_calls(look.probe, calls, chosen, len(rows))
            made = run_calls(x, cut, first=start)
            run.streams = tuple(t.shape[1] for t in made) if isinstance(made, tuple) else None
            after = tokens_of(made)
            for place, i in enumerate(chosen):
                if not decisions[i].skip:
                    pieces[i] = after[place : place + 1]
                    self.store(rows[i], look, before[i : i + 1], pieces[i])
                    rows[i].filled = look.step.index
            if len(runs) == len(rows):
                return made
        for i, decision in enumerate(decisions):
            if decision.skip:
                pieces[i] = self.estimate(rows[i], look, before[i : i + 1])
        return with_tokens(join([pieces[i] for i in range(len(rows))]), run.streams)

    def _tell(self, state: StrategyState, keys: Sequence[tuple[str, int]], decisions: Sequence[Decision]) -> None:
        """What was decided, into the trace of the step and the totals of the run."""
        records = [
            {"branch": branch, "sample": sample, "skipped": d.skip, "score": d.score}
            for (branch, sample), d in zip(keys, decisions, strict=True)
        ]
        note(state, "cache", records)
        total = state.batch.logging_info["step_cache"]
        total["rows"] += len(records)
        total["skipped"] += sum(d.skip for d in decisions)


def relative_changes(now: Tensor, then: Sequence[Tensor | None]) -> list[float | None]:
    """mean|now - then| / mean|then| of each row, in float32; None for a row that has no past.

    Args:
        now: [R, ...].
        then: R tensors [1, ...], or None.
    """
    places = [i for i, past in enumerate(then) if past is not None]
    changes: list[float | None] = [None] * len(then)
    if places:
        past = join([t for t in then if t is not None]).float().flatten(1)
        current = (now if len(places) == len(then) else join([now[i : i + 1] for i in places])).float().flatten(1)
        ratios = as_floats((current - past).abs().mean(1) / past.abs().mean(1))
        for place, ratio in zip(places, ratios, strict=True):
            changes[place] = ratio
    return changes
