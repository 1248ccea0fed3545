"""Schedules whose noise levels fall evenly from 1 before the shift."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kinetoscope.diffusion.scheduler import SchedulerAdapter, ScheduleRun


class EvenSchedule(SchedulerAdapter):
    """A prototype whose Euler runs take the levels 1, 1 - 1/S, ..., 1/S before the shift (HunyuanVideo).

    diffusers' own choice ends at the shifted level of the last training step instead. Other solvers keep theirs, which
    are close to even.
    """

    @classmethod
    def of(cls, prototype: SchedulerAdapter) -> EvenSchedule:
        """The same class and configuration with even levels."""
        return cls(prototype.class_name, prototype.config, prototype.solver)

    def override(self, scheduler: str | None = None, shift: float | None = None) -> EvenSchedule:
        """See `SchedulerAdapter.override`."""
        return self.of(super().override(scheduler, shift))

    def start(
        self,
        num_steps: int,
        device: torch.device | str = "cpu",
        *,
        sigmas: Sequence[float] | None = None,
        **more: Any,
    ) -> ScheduleRun:
        """See `SchedulerAdapter.start`."""
        if sigmas is None and self.class_name == "FlowMatchEulerDiscreteScheduler":
            sigmas = [1.0 - i / num_steps for i in range(num_steps)]
        return super().start(num_steps, device, sigmas=sigmas, **more)
