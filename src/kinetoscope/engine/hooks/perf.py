"""Time of each denoising step and of the whole run."""

from __future__ import annotations

import logging
import statistics
import time
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from kinetoscope.engine.hooks.base import Hook
from kinetoscope.engine.protocols import Step, StrategyState

logger = logging.getLogger("kinetoscope.perf")


@dataclass(slots=True)
class _Clock:
    start: float
    step_start: float = 0.0
    steps: list[float] = field(default_factory=list[float])


class PerfLoggingHook(Hook):
    """Puts `{"steps_ms": [...], "total_ms": ...}` into `batch.logging_info["denoising_perf"]` and logs a summary.

    Both values are up to date after each step. On CUDA the hook waits for the device at both ends of a step, which
    costs overlap; so it is opt-in (`perf_logging=True` or `KINETOSCOPE_DENOISING_PERF_LOGGING=1`).

    Args:
        rank: only rank 0 logs.
    """

    name: ClassVar[str] = "perf"
    order: ClassVar[int] = 10

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank

    def on_run_start(self, state: StrategyState) -> None:
        clock = state.scratch[self] = _Clock(_now(state))
        state.batch.logging_info["denoising_perf"] = {"steps_ms": clock.steps, "total_ms": 0.0}

    def on_step_start(self, state: StrategyState, step: Step) -> None:
        state.scratch[self].step_start = _now(state)

    def on_step_end(self, state: StrategyState, step: Step) -> None:
        clock: _Clock = state.scratch[self]
        now = _now(state)
        clock.steps.append((now - clock.step_start) * 1e3)
        state.batch.logging_info["denoising_perf"]["total_ms"] = (now - clock.start) * 1e3

    def on_run_end(self, state: StrategyState, error: BaseException | None) -> None:
        clock: _Clock = state.scratch[self]
        total = (_now(state) - clock.start) * 1e3
        state.batch.logging_info["denoising_perf"]["total_ms"] = total
        if self.rank == 0 and clock.steps:
            logger.info(
                "denoising: %d steps in %.1f ms (median %.2f, first %.2f, slowest %.2f ms a step)",
                len(clock.steps),
                total,
                statistics.median(clock.steps),
                clock.steps[0],
                max(clock.steps),
            )


def _now(state: StrategyState) -> float:
    if state.latents.is_cuda:
        torch.cuda.synchronize(state.latents.device)
    return time.perf_counter()
