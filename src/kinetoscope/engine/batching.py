"""Several runs driven together: the rows of their steps in one forward, whatever step each of them is at."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor

from kinetoscope.attention import AttentionTable
from kinetoscope.core.errors import CompositionError
from kinetoscope.core.out_of_memory import is_out_of_memory
from kinetoscope.engine.engine import DenoisingEngine, PendingForward
from kinetoscope.engine.protocols import Event, ModelInputs, StrategyState, Tree, join_rows, map_tree
from kinetoscope.engine.rows import BATCH_POSITIONS
from kinetoscope.engine.strategies.standard import StandardStrategy

logger = logging.getLogger(__name__)


class BatchedRun:
    """One run in a `StepBatcher`.

    Attributes:
        state: of the run.
        done: it has ended: to the end, by an error, or by `StepBatcher.remove`.
        error: what ended it, if it failed.
        limit: latent positions of a forward that it shares, at most; None: the batcher's. Lowered where a shared
            forward failed; 0: its forwards are computed alone.
    """

    def __init__(self, engine: DenoisingEngine, state: StrategyState) -> None:
        self.engine, self.state = engine, state
        self.done = False
        self.error: Exception | None = None
        self.limit: int | None = None
        self.items = engine.iterate_forwards(state)

    def advance(self, events: list[tuple[BatchedRun, Event]], *, until: str) -> PendingForward | None:
        """Go on to the next "forward", or over the next "step"; what happens on the way is added to `events`.

        Returns:
            the forward that waits, or None where the run has ended or has taken its step.
        """
        try:
            for item in self.items:
                if isinstance(item, PendingForward):
                    return item
                events.append((self, item))
                if item.kind == until:
                    return None
        except self.state.args.run_errors as error:  # one run's failure must not end the others
            self.error = error
        self.done = True
        return None


class StepBatcher:
    """Advances many runs step by step; a run may join or leave between any two steps.

    Rows of runs on the same network, with latents and conditioning of the same shapes, share a forward; each may be at
    a timestep of its own. Every result is, to rounding, what the run alone would give. Runs whose forwards cannot be
    joined (hooks that intercept forwards, block runs with K/V caches, `cfg="sequential"`) take their steps one by one.

    A shared forward that fails is logged, and each of its runs computes its own. Where memory ran out, these runs share
    forwards of half the size from then on; after another error they share none. Where several ranks compute a run, the
    error is raised instead: a rank that went another way alone would leave the others waiting.

    Args:
        limit: latent positions a forward at most, where it holds more than one run.
    """

    def __init__(self, limit: int = BATCH_POSITIONS) -> None:
        self.limit = limit
        self.runs: list[BatchedRun] = []
        self.joined = 0
        self._equal: dict[tuple[int, int], bool] = {}

    def add(self, engine: DenoisingEngine, state: StrategyState) -> BatchedRun:
        """A prepared run joins; its first step is taken by the next `step`.

        Raises:
            CompositionError: the state is that of a run which is here already.
        """
        if any(run.state is state for run in self.runs):
            raise CompositionError("this run is in the batch already; prepare a state for each run")
        run = BatchedRun(engine, state)
        self.runs.append(run)
        self._equal.clear()
        return run

    def remove(self, run: BatchedRun) -> None:
        """A run leaves, done or not: its hooks end now."""
        self.runs = [r for r in self.runs if r is not run]
        run.done = True
        run.items.close()
        self._equal.clear()

    def step(self) -> list[tuple[BatchedRun, Event]]:
        """One step of every run, or what is left of it; ended runs leave.

        A run that fails is left with its `error`; the others go on.

        Returns:
            what happened, in order. `joined` is then the number of runs that shared a forward with others.
        """
        events: list[tuple[BatchedRun, Event]] = []
        waiting: list[_Waiting] = []
        for run in self.runs:
            pending = run.advance(events, until="")
            if pending is not None:
                waiting.append((run, pending))
        self.joined = 0
        for group in self._groups(waiting):
            if len(group) > 1:
                self._forward(group)
        for run, _ in waiting:
            run.advance(events, until="step")
        for run in [r for r in self.runs if r.done]:
            self.remove(run)
        return events

    def drain(self) -> Iterator[tuple[BatchedRun, Event]]:
        """All events of all runs to their ends; runs may be added meanwhile. Closing it ends every run."""
        with ExitStack() as ends:  # every run ends, even when the hook of another fails
            ends.callback(self._remove_all)
            while self.runs:
                yield from self.step()

    def _remove_all(self) -> None:
        with ExitStack() as ends:
            for run in self.runs:
                ends.callback(self.remove, run)

    def _groups(self, waiting: Sequence[_Waiting]) -> list[list[_Waiting]]:
        """Forwards that can be one, in the order they came."""
        groups: list[list[_Waiting]] = []
        keys: list[Any] = []
        for entry in waiting:
            key = _join_key(entry[1])
            for known, group in zip(keys, groups, strict=True):
                if known is not None and known == key and self._fits([*group, entry]):
                    group.append(entry)
                    break
            else:
                keys.append(key)
                groups.append([entry])
        return groups

    def _fits(self, group: Sequence[_Waiting]) -> bool:
        """Return whether the last forward of `group` may join the others."""
        limit = min(self.limit if run.limit is None else run.limit for run, _ in group)
        first, last = group[0][1].inputs, group[-1][1].inputs
        return sum(_positions(p.inputs) for _, p in group) <= limit and self._same(first.shared, last.shared)

    def _same(self, a: Tree, b: Tree) -> bool:
        """Whether two trees hold equal values."""
        if a is b:
            return True
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            key = (id(a), id(b))
            if key not in self._equal:
                self._equal[key] = a.shape == b.shape and torch.equal(a, b)
            return self._equal[key]
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            left, right = cast(Mapping[str, Tree], a), cast(Mapping[str, Tree], b)
            return left.keys() == right.keys() and all(self._same(left[k], right[k]) for k in left)
        if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
            ours, theirs = cast(Sequence[Tree], a), cast(Sequence[Tree], b)
            return len(ours) == len(theirs) and all(map(self._same, ours, theirs))
        return bool(cast(object, a) == cast(object, b))

    def _forward(self, runs: Sequence[_Waiting]) -> None:
        """Compute one forward for several runs; each gets its rows. If it fails, each is left to itself."""
        group = [pending for _, pending in runs]
        inputs = [p.inputs for p in group]
        rows = [len(i.latents) for i in inputs]
        first = group[0]
        try:
            whole = ModelInputs(
                torch.cat([i.latents for i in inputs]),
                torch.cat([i.timestep for i in inputs]),
                tuple(f"{n}:{b}" for n, i in enumerate(inputs) for b in i.branches),
                inputs[0].batch,
                join_rows([i.conditioning for i in inputs]),
                inputs[0].shared,
                join_rows([_spread(i.step, n) for i, n in zip(inputs, rows, strict=True)]),
            )
            output = first.engine.forward(first.state, whole, first.state.step)
        except Exception as error:  # out of memory, or one run's fault: alone, the runs without fault succeed
            if first.state.args.ranks > 1:
                raise
            self._after_failure([run for run, _ in runs], sum(map(_positions, inputs)), error)
            return
        self.joined += len(group)
        start = 0
        for pending, count in zip(group, rows, strict=True):
            pending.output = output[start : start + count]
            start += count
            pending.rows = ((0, len(pending.inputs.branches)),)
            pending.why = f"in one forward with {len(group) - 1} other runs"

    def _after_failure(self, runs: Sequence[BatchedRun], positions: int, error: Exception) -> None:
        """Log why a shared forward failed, and remember it, so that the next step does not try the same again."""
        memory = is_out_of_memory(error)
        text = " ".join(str(error).split())
        logger.warning(
            "a forward shared by %d runs failed (%s%s); each computes its own%s",
            len(runs), type(error).__name__, f": {text}" if text else "",
            ", and later forwards are shared by half as many" if memory else ", also in later steps",
        )  # fmt: skip
        for run in runs:
            run.limit = positions // 2 if memory else 0


_Waiting = tuple[BatchedRun, PendingForward]


def _positions(inputs: ModelInputs) -> int:
    return inputs.latents.numel() // inputs.latents.shape[1]


def _join_key(pending: PendingForward) -> object:
    """Equal for forwards that differ in values alone; None for those that are never joined."""
    strategy, state, inputs = pending.engine.strategy, pending.state, pending.inputs
    if not isinstance(strategy, StandardStrategy) or pending.engine.interceptors or state.args.cfg == "sequential":
        return None
    if type(strategy).forward is not StandardStrategy.forward:
        return None
    shapes = tuple(_signature(part) for part in (inputs.latents, inputs.timestep, inputs.conditioning, inputs.step))
    table, step = state.args.attention, state.active
    follows_steps = isinstance(table, AttentionTable) and any(c.sparse is not None for c in table.choices.values())
    return id(strategy.network(state)), state.args, shapes, (step.index, step.count) if follows_steps else None


def _signature(tree: Tree) -> object:
    """The structure of a tree, with dtypes and the shapes of rows."""
    if isinstance(tree, Tensor):
        return tree.shape[1:], tree.dtype
    if isinstance(tree, Mapping):
        return tuple((k, _signature(v)) for k, v in cast(Mapping[str, Tree], tree).items())
    if isinstance(tree, (tuple, list)):
        return tuple(_signature(v) for v in cast(Sequence[Tree], tree))
    return tree


def _spread(tree: Tree, rows: int) -> Tree:
    """A tree of tensors whose first axis is 1 for all rows, as one with an entry a row."""

    def expand(x: Tensor) -> Tensor:
        return x.expand(rows, *x.shape[1:]) if x.shape[0] == 1 else x

    return map_tree(expand, tree)
