"""TeaCache (arXiv 2411.19108): the time embedding foretells, by a polynomial fitted once, how the output changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from kinetoscope.core.errors import CompositionError, InputError
from kinetoscope.engine.hooks.caches.base import CacheRun, Decision, Look, Row, StepCache, relative_changes
from kinetoscope.nn.stack import BlockCall

TIME_ARGUMENTS = ("modulation", "projected", "time", "emb")
"""Names under which blocks are given what the timestep sets."""


@dataclass(slots=True)
class TeaRow(Row):
    """The time signal of the step before, the residual of the last full step, and the change since then."""

    signal: Tensor | None = None
    residual: Tensor | None = None
    change: float = 0.0


class TeaCache(StepCache):
    """Keeps the residual of the block stack while the change foretold from the time embedding stays small.

    With r = mean|e - e'| / mean|e'| of the time embedding e as the blocks get it and e' of the step before, the
    change since the last full step is the sum of polynomial(r); a step is left out while it is below `threshold`.

    Args:
        coefficients: of the polynomial, highest power first; of one network, so not for models with two experts.
        threshold: the change from which on a step runs.
        warmup: steps at the start that always run.
    """

    name: ClassVar[str] = "teacache"
    settings: ClassVar[Mapping[str, type]] = {"threshold": float, "warmup": int}
    row: ClassVar[type[Row]] = TeaRow

    def __init__(self, coefficients: Sequence[float], threshold: float = 0.05, warmup: int = 5) -> None:
        if not coefficients:
            raise InputError("teacache: it needs the coefficients of the model; `kinetoscope calibrate` makes them")
        if not threshold >= 0 or warmup < 1:
            raise InputError(f"teacache: threshold={threshold} must be at least 0, warmup={warmup} at least 1")
        self.coefficients, self.threshold, self.warmup = tuple(coefficients), threshold, warmup

    def foretold(self, change: float) -> float:
        """The polynomial of a relative change of the time embedding."""
        value = 0.0
        for coefficient in self.coefficients:
            value = value * change + coefficient
        return value

    def _rows(self, run: CacheRun, keys: Any, step: Any, calls: Sequence[BlockCall]) -> list[Any]:
        if run.network not in (None, calls[0].block):
            raise CompositionError("teacache: its coefficients are of one network, and this run has two experts")
        return super()._rows(run, keys, step, calls)

    def decide(self, rows: Sequence[TeaRow], look: Look) -> list[Decision]:
        """By the step's time embedding."""
        signal = time_signal(look.calls)
        changes = relative_changes(signal.expand(len(rows), *signal.shape[1:]), [row.signal for row in rows])
        decisions: list[Decision] = []
        for i, (row, change) in enumerate(zip(rows, changes, strict=True)):
            row.signal = signal if signal.shape[0] == 1 else signal[i : i + 1]
            if change is None or look.step.index < self.warmup:
                decisions.append(Decision(False))
                continue
            row.change += self.foretold(change)
            decisions.append(Decision(row.change < self.threshold, row.change))
            if not decisions[-1].skip:
                row.change = 0.0
        return decisions

    def store(self, row: TeaRow, look: Look, before: Tensor, after: Tensor) -> None:
        """What the blocks added."""
        row.residual = after - before

    def estimate(self, row: TeaRow, look: Look, before: Tensor) -> Tensor:
        """What the blocks added the last time."""
        assert row.residual is not None
        return before + row.residual


def time_signal(calls: Sequence[BlockCall]) -> Tensor:
    """The time embedding as the first block gets it, [R or 1, ...].

    A block that is given more than the embedding (a table of its own added) says by `time_signal(**rows)` what the
    embedding is.

    Raises:
        CompositionError: the blocks are not told the time in a way that is known here.
    """
    call = calls[0]
    own = getattr(call.block, "time_signal", None)
    if own is not None:
        return own(**call.rows)
    for name in TIME_ARGUMENTS:
        value = call.rows.get(name)
        if isinstance(value, Tensor):
            return value
    raise CompositionError(
        f"teacache does not know what {type(call.block).__name__} is told of the timestep; use fbcache, magcache or "
        "taylorseer"
    )
