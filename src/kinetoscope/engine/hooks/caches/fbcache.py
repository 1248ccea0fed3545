"""FBCache and DBCache: what the first blocks add tells whether the others would add something new.

Sources: FBCache is "First Block Cache" of github chengzeyi/ParaAttention, in diffusers `apply_first_block_cache`;
DBCache is its general form in github vipshop/cache-dit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kinetoscope.core.errors import InputError
from kinetoscope.engine.hooks.caches.base import Decision, Look, Row, StepCache, relative_changes
from kinetoscope.engine.hooks.caches.rows import tokens_of
from kinetoscope.nn.stack import Hidden


@dataclass(slots=True)
class ProbedRow(Row):
    """What the first blocks added in the last step that ran, [1, N, d] of the video's tokens, and what the skipped ones
    did, of all tokens; and how many steps were left out since."""

    probe: Tensor | None = None
    residual: Tensor | None = None
    skipped: int = 0


class FBCache(StepCache):
    """A step whose first blocks add to the tokens nearly what they added in the last full step keeps the rest of it.

    With r = (tokens after the first blocks) - (tokens before them): skip where mean|r - r'| / mean|r'| is at most
    `threshold`, r' being that of the last step that ran in full.

    Args:
        threshold: largest relative change of r that is skipped on.
        first: blocks that always run and are measured.
        last: blocks at the end that always run.
        warmup: steps at the start that always run in full.
        limit: most steps left out one after another; 0: no limit.
    """

    name: ClassVar[str] = "fbcache"
    settings: ClassVar[Mapping[str, type]] = {
        "threshold": float, "first": int, "last": int, "warmup": int, "limit": int
    }  # fmt: skip
    row: ClassVar[type[Row]] = ProbedRow

    def __init__(self, threshold: float = 0.05, first: int = 1, last: int = 0, warmup: int = 0, limit: int = 0) -> None:
        if not threshold >= 0:
            raise InputError(f"{self.name}: threshold={threshold} is not a number from 0 on")
        if first < 1 or min(last, warmup, limit) < 0:
            raise InputError(
                f"{self.name}: first={first} must be at least 1; last={last}, warmup={warmup}, limit={limit} at least 0"
            )
        self.threshold, self.first, self.last, self.warmup, self.limit = threshold, first, last, warmup, limit

    def decide(self, rows: Sequence[ProbedRow], look: Look) -> list[Decision]:
        """By the change of what the first blocks add to the tokens of the video."""
        added = _added(look.before, look.probe)
        scores = relative_changes(added, [row.probe for row in rows])
        decisions: list[Decision] = []
        for i, (row, score) in enumerate(zip(rows, scores, strict=True)):
            allowed = look.step.index >= self.warmup and not 0 < self.limit <= row.skipped
            skip = allowed and score is not None and score <= self.threshold  # a NaN is not: such a step runs
            if skip:
                row.skipped += 1
            else:
                row.probe, row.skipped = added[i : i + 1], 0
            decisions.append(Decision(skip, score))
        return decisions

    def store(self, row: ProbedRow, look: Look, before: Tensor, after: Tensor) -> None:
        """What the blocks added."""
        row.residual = after - before

    def estimate(self, row: ProbedRow, look: Look, before: Tensor) -> Tensor:
        """What the first blocks made, and what the others added the last time."""
        assert row.residual is not None
        return before + row.residual


class DBCache(FBCache):
    """`FBCache` with the published defaults of cache-dit: eight blocks measured, eight steps of warm-up.

    Args:
        threshold, first, last, warmup, limit: as for `FBCache`.
    """

    name: ClassVar[str] = "dbcache"

    def __init__(self, threshold: float = 0.08, first: int = 8, last: int = 0, warmup: int = 8, limit: int = 0) -> None:
        super().__init__(threshold, first, last, warmup, limit)


def _added(before: Hidden, after: Hidden) -> Tensor:
    """What was added to the tokens of the video; to all of them, where those of the text are no stream of their own."""
    if isinstance(before, tuple) and isinstance(after, tuple):
        return after[0] - before[0]
    return tokens_of(after) - tokens_of(before)
