"""How the rows of a step are put into forwards: an execution plan, never a change of result beyond rounding."""

from __future__ import annotations

from kinetoscope.core.errors import ConfigError
from kinetoscope.engine.protocols import ModelInputs

CFG_PLANS = ("auto", "sequential", "batched")
PARALLEL = "parallel"
"""The plan where devices share the branches: all rows in one forward, of which each device computes its share."""
BATCH_POSITIONS = 16_384
"""`auto` batches the branches while a forward has at most this many latent positions (channels not counted): below it a
forward is bound by its number of operations, above it by arithmetic that batching cannot save."""


def plan_rows(inputs: ModelInputs, plan: str) -> tuple[tuple[tuple[int, int], ...], str]:
    """Branch ranges [start, stop), one a forward, and why these.

    Raises:
        ConfigError: `plan` is not one of `CFG_PLANS`, nor `PARALLEL`.
    """
    if plan not in (*CFG_PLANS, PARALLEL):
        raise ConfigError(f"unknown cfg plan {plan!r}; known: {', '.join(CFG_PLANS)}")
    count = len(inputs.branches)
    positions = inputs.latents.numel() // inputs.latents.shape[1] if inputs.latents.ndim > 1 else 0
    if count == 1:
        return ((0, 1),), "one branch"
    if plan == PARALLEL:
        return ((0, count),), "parallel: each device forwards its share of the branches"
    small = positions <= BATCH_POSITIONS
    why = f"asked: {plan}"
    if plan == "auto":
        limit = f"{positions} latent positions are {'at most' if small else 'more than'} {BATCH_POSITIONS}"
        why = f"auto: {'batched' if small else 'sequential'}, {limit}"
    if plan == "batched" or (plan == "auto" and small):
        return ((0, count),), why
    return tuple((i, i + 1) for i in range(count)), why
