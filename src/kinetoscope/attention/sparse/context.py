"""What every sparse kind knows of the forward it is called in: the grid, its tiles, step, layer and density."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kinetoscope.attention.parameters import Parameters
from kinetoscope.attention.sparse.tiles import TileLayout, Triple, tile_layout
from kinetoscope.core.context import StepInfo, current_context


@dataclass(frozen=True, slots=True)
class Schedule:
    """Where in a run a kind is sparse.

    Attributes:
        dense_steps: the first steps are dense: how many, or their share of the run if below 1.
        dense_layers: the first blocks of the transformer are dense.
        ramp: over so many steps after the dense ones the sparsity grows evenly to its full value; kinds without a
            sparsity (STA) have none.
    """

    dense_steps: float = 0
    dense_layers: int = 0
    ramp: int = 0

    @classmethod
    def read(cls, given: Parameters, *, ramp: bool) -> Schedule:
        """The parameters `dense_steps`, `dense_layers` and, where the kind has it, `ramp`.

        Raises:
            ConfigError: a value is out of range.
        """
        steps = given.number("dense_steps", 0, 0, 10**6)
        if steps > 1 and steps != int(steps):
            raise given.error(f"dense_steps={steps:g} should be a whole number of steps, or a share below 1")
        return cls(steps, given.whole("dense_layers", 0, 0), given.whole("ramp", 0, 0) if ramp else 0)

    def share(self, step: StepInfo | None, layer: int) -> float:
        """Of the full sparsity, how much is in force; 0 is dense. A forward that is no step of a run counts as late."""
        if layer < self.dense_layers:
            return 0.0
        if step is None:
            return 1.0
        dense = math.ceil(self.dense_steps * step.count) if self.dense_steps < 1 else int(self.dense_steps)
        if step.index < dense:
            return 0.0
        return min(1.0, (step.index - dense + 1) / (self.ramp + 1))


@dataclass(frozen=True, slots=True)
class AttentionContext:
    """What a sparse kind is told.

    Attributes:
        grid: tokens of the video along time, height, width.
        layout: their tiles.
        others: keys after those of the grid (text), which all queries see.
        step: the step of the run; None outside one.
        layer: number of the transformer's block.
        share: of the kind's sparsity, how much is in force; 0 is dense.
    """

    grid: Triple
    layout: TileLayout
    others: int
    step: StepInfo | None
    layer: int
    share: float

    def kept(self, sparsity: float, groups: int) -> int:
        """How many of a number of groups of keys a query group sees, at least one (arXiv 2505.13389's rounding up)."""
        return max(1, min(groups, math.ceil((1 - self.share * sparsity) * groups - 1e-9)))


def attention_context(
    grid: Triple, tile: Triple, keys: int, schedule: Schedule, device: torch.device
) -> AttentionContext:
    """The context of a call: what the current `ForwardContext` says, and the layout of this shape (kept)."""
    forward = current_context()
    step, layer = (None, 0) if forward is None else (forward.step, forward.layer)
    layout = tile_layout(grid, tile, device)
    return AttentionContext(grid, layout, keys - layout.tokens, step, layer, schedule.share(step, layer))
