"""TaylorSeer (arXiv 2503.06923): between full steps the output is continued as a polynomial in the step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from kinetoscope.core.errors import InputError
from kinetoscope.engine.hooks.caches.base import Decision, Look, Row, StepCache


@dataclass(slots=True)
class TaylorRow(Row):
    """Divided differences at the last full step, order 0 first, [1, N, d] float32 each."""

    factors: list[Tensor] = field(default_factory=list[Tensor])


class TaylorSeer(StepCache):
    """Steps run in full at a fixed interval; between them what the blocks give is extrapolated.

    With f_0 the value of a full step and f_{j+1} = (f_j - f_j of the full step before) / (steps between them), the
    value k steps later is the sum of f_j k^j / j!. Full are the first `warmup` steps, then each `interval`th, counted
    as in diffusers: step i where (i - warmup - 1) is a multiple of the interval.

    Args:
        interval: steps from one full step to the next.
        warmup: full steps at the start.
        order: highest order of the polynomial.
        target: "residual": what the blocks add to the tokens is extrapolated; "output": the tokens after them.
        end: full from this step on; 0: never.
    """

    name: ClassVar[str] = "taylorseer"
    settings: ClassVar[Mapping[str, type]] = {
        "interval": int, "warmup": int, "order": int, "target": str, "end": int
    }  # fmt: skip
    row: ClassVar[type[Row]] = TaylorRow
    counts_steps: ClassVar[bool] = True

    def __init__(
        self, interval: int = 5, warmup: int = 3, order: int = 1, target: str = "residual", end: int = 0
    ) -> None:
        if interval < 1 or warmup < 1 or order < 0 or end < 0:
            raise InputError(
                f"{self.name}: interval={interval} and warmup={warmup} must be at least 1; order={order} and end={end} "
                "at least 0"
            )
        if target not in ("residual", "output"):
            raise InputError(f"{self.name}: target={target!r} is neither residual nor output")
        self.interval, self.warmup, self.highest, self.target, self.end = interval, warmup, order, target, end

    def runs(self, index: int) -> bool:
        """Whether step `index` runs in full."""
        due = (index - self.warmup - 1) % self.interval == 0
        return index < self.warmup or due or 0 < self.end <= index

    def decide(self, rows: Sequence[TaylorRow], look: Look) -> list[Decision]:
        """By the step alone; the score is how many steps back the last full one is."""
        index = look.step.index
        skip = not self.runs(index)
        return [Decision(skip, float(index - row.filled) if row.filled >= 0 else None) for row in rows]

    def store(self, row: TaylorRow, look: Look, before: Tensor, after: Tensor) -> None:
        """New differences of every order that there are values for."""
        # a copy: what a captured graph returns is written over by its next run
        value = after.to(torch.float32, copy=True) if self.target == "output" else after.float() - before.float()
        gap, factors = look.step.index - row.filled, [value]
        for past in row.factors[: self.highest]:
            factors.append((factors[-1] - past) / gap)
        row.factors = factors

    def estimate(self, row: TaylorRow, look: Look, before: Tensor) -> Tensor:
        """The polynomial at this step."""
        k = look.step.index - row.filled
        value = row.factors[0]
        for j, factor in enumerate(row.factors[1:], 1):
            value = torch.add(value, factor, alpha=k**j / math.factorial(j))
        return (value if self.target == "output" else before.float() + value).to(before.dtype)
