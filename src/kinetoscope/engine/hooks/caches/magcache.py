"""MagCache (arXiv 2506.09045): how much larger or smaller a step's residual is than the one before is known ahead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kinetoscope.core.errors import CompositionError, InputError
from kinetoscope.engine.hooks.caches.base import Decision, Look, Row, StepCache


@dataclass(slots=True)
class MagRow(Row):
    """The residual of the last full step; since then the product of ratios, the summed error and the steps left out."""

    residual: Tensor | None = None
    ratio: float = 1.0
    error: float = 0.0
    skipped: int = 0


class MagCache(StepCache):
    """Keeps the residual of the block stack while the error that its magnitude would have stays small.

    The ratio gamma_t = mean(|residual_t| / |residual_{t-1}|) over tokens is measured once a model (`kinetoscope
    calibrate`). Over steps left out A = product of gamma, E = sum of |1 - A|; a step is left out while E is at most
    `threshold` and no more than `limit` were left out one after another.

    Args:
        ratios: branch -> gamma of each step of the calibration; read at the nearest step where a run has another number
            of steps.
        threshold: largest error E.
        limit: most steps left out one after another.
        retention: fraction of the steps, from the start, that always run.
    """

    name: ClassVar[str] = "magcache"
    settings: ClassVar[Mapping[str, type]] = {"threshold": float, "limit": int, "retention": float}
    row: ClassVar[type[Row]] = MagRow
    counts_steps: ClassVar[bool] = True

    def __init__(
        self,
        ratios: Mapping[str, Sequence[float]],
        threshold: float = 0.06,
        limit: int = 3,
        retention: float = 0.2,
    ) -> None:
        if not ratios or not all(ratios.values()):
            raise InputError("magcache: it needs the magnitude ratios of the model; `kinetoscope calibrate` makes them")
        if not (threshold >= 0 and limit >= 1 and 0 <= retention <= 1):
            raise InputError(
                f"magcache: threshold={threshold} must be at least 0, limit={limit} at least 1, retention={retention} "
                "in [0, 1]"
            )
        self.ratios = {branch: tuple(values) for branch, values in ratios.items()}
        self.threshold, self.limit, self.retention = threshold, limit, retention

    def gamma(self, branch: str, index: int, count: int) -> float:
        """The ratio of step `index` of `count`."""
        if branch not in self.ratios:
            raise CompositionError(
                f"magcache was calibrated for the branches {', '.join(self.ratios)}, not for {branch!r}; calibrate it "
                "with the guidance that you use"
            )
        values = self.ratios[branch]
        return values[nearest_index(index, count, len(values))]

    def decide(self, rows: Sequence[MagRow], look: Look) -> list[Decision]:
        """By the ratios alone."""
        step = look.step
        start = int(self.retention * step.count + 0.5)
        return [self._decide(row, self.gamma(b, step.index, step.count), step.index >= start)
                for row, b in zip(rows, look.branches, strict=True)]  # fmt: skip

    def _decide(self, row: MagRow, gamma: float, allowed: bool) -> Decision:
        if not allowed or row.residual is None:
            return Decision(False)
        row.ratio *= gamma
        row.error += abs(1.0 - row.ratio)
        row.skipped += 1
        decision = Decision(row.error <= self.threshold and row.skipped <= self.limit, row.error)
        if not decision.skip:
            row.ratio, row.error, row.skipped = 1.0, 0.0, 0
        return decision

    def store(self, row: MagRow, look: Look, before: Tensor, after: Tensor) -> None:
        """What the blocks added."""
        row.residual = after - before

    def estimate(self, row: MagRow, look: Look, before: Tensor) -> Tensor:
        """What the blocks added the last time."""
        assert row.residual is not None
        return before + row.residual


def nearest_index(index: int, count: int, length: int) -> int:
    """Which of `length` values over a run stands for step `index` of `count`: the nearest, ends on ends.

    Halves go to the even index, as in the published code.
    """
    if count == length:
        return index
    return length - 1 if count == 1 else round(index * (length - 1) / (count - 1))
