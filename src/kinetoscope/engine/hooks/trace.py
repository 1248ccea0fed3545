"""A record of every step: what was evaluated, how strong, how the branches agree."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import torch
from torch import Tensor

from kinetoscope.core.transfer import as_floats
from kinetoscope.diffusion.guidance import COND, UNCOND
from kinetoscope.engine.hooks.base import Hook
from kinetoscope.engine.hooks.notes import notes_of
from kinetoscope.engine.protocols import Step, StrategyState


class StepTraceHook(Hook):
    """Appends one dictionary a step to `batch.logging_info["step_trace"]`, fit for JSON.

    Keys: `step`, `block` (None outside block runs), `timestep`, `sigma` (None where the run has no scheduler),
    `rows` (branches of each forward), `why` (what chose these forwards), `guidance_scale`, `cond_norm`, `uncond_norm`,
    `cosine` (per sample; None for a branch that was not evaluated), `latent_std`, `ms`. Norms are Euclidean over a
    sample.
    What other hooks say of a step (`hooks.notes`) follows: of a step cache `cache`, one object a row with its `branch`,
    `sample`, whether its blocks were `skipped`, and the `score` that decided it.
    """

    name: ClassVar[str] = "trace"
    order: ClassVar[int] = 20

    def on_run_start(self, state: StrategyState) -> None:
        state.batch.logging_info["step_trace"] = []

    def on_step_start(self, state: StrategyState, step: Step) -> None:
        state.scratch[self] = time.perf_counter()

    def on_step_end(self, state: StrategyState, step: Step) -> None:
        branches = step.by_branch()
        cond, uncond = _flat(branches.get(COND)), _flat(branches.get(UNCOND))
        record: dict[str, Any] = {
            "step": step.index,
            "block": step.block,
            "timestep": step.timestep,
            "sigma": state.scheduler.sigmas[step.index] if state.scheduler else None,
            "rows": [list(step.branches[start:stop]) for start, stop in step.rows],
            "why": step.why,
            "guidance_scale": state.guidance.scale,
            "cond_norm": _norms(cond),
            "uncond_norm": _norms(uncond),
            "cosine": None
            if cond is None or uncond is None
            else as_floats(torch.nn.functional.cosine_similarity(cond, uncond, dim=1)),
            "latent_std": state.latents.std().item(),
            "ms": (time.perf_counter() - state.scratch[self]) * 1e3,
            **notes_of(state),
        }
        state.batch.logging_info["step_trace"].append(record)


def _flat(prediction: Tensor | None) -> Tensor | None:
    return None if prediction is None else prediction.float().flatten(1)


def _norms(rows: Tensor | None) -> list[float] | None:
    return None if rows is None else as_floats(rows.square().sum(1).sqrt())
