"""Sampling in the noise levels of EDM (arXiv 2206.00364): Euler steps from sigma_max down, on clean estimates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kinetoscope.core.errors import ConfigError, InputError
from kinetoscope.core.transfer import as_floats
from kinetoscope.diffusion.runge_kutta import EulerSolver
from kinetoscope.diffusion.scheduler import SchedulerAdapter, ScheduleRun
from kinetoscope.diffusion.solver import SolverInputs

_DEFAULTS: dict[str, Any] = {
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "rho": 7.0,
    "sigma_schedule": "karras",
    "final_sigmas_type": "zero",
}


class EDMAdapter(SchedulerAdapter):
    """Prototype of EDM schedules; its runs step on estimates of the clean sample.

    Args:
        config: fields of a published EDMEulerScheduler; those that only describe preconditioning are not read.

    Raises:
        ConfigError: a schedule that is not known, or levels that do not fall.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.class_name, self.solver = "EDMEulerScheduler", "euler"
        self.config = {**_DEFAULTS, **config}
        for name, known in (
            ("sigma_schedule", ("karras", "exponential")),
            ("final_sigmas_type", ("zero", "sigma_min")),
        ):
            if self.config[name] not in known:
                raise ConfigError(f"EDM scheduler: {name}={self.config[name]!r}; known: {', '.join(known)}")
        if not 0 < self.config["sigma_min"] < self.config["sigma_max"]:
            raise ConfigError(
                f"EDM scheduler: sigma_min={self.config['sigma_min']} and sigma_max={self.config['sigma_max']} "
                "should rise from above 0"
            )

    @property
    def shift(self) -> float:
        """EDM levels are not shifted: 1."""
        return 1.0

    def override(self, scheduler: str | None = None, shift: float | None = None) -> SchedulerAdapter:
        """This prototype; nothing of it can be overridden.

        Raises:
            InputError: another solver than "euler", or a shift other than 1.
        """
        if scheduler not in (None, "euler"):
            raise InputError(f"scheduler={scheduler!r}: this model is sampled in EDM noise levels, with 'euler' only")
        if shift not in (None, 1.0):
            raise InputError(f"flow_shift={shift}: this model is sampled in EDM noise levels, which have no shift")
        return self

    def start(self, num_steps: int, device: torch.device | str = "cpu", **schedule: Any) -> ScheduleRun:
        """Return a private run of `num_steps` steps; `ScheduleRun.step` takes the clean estimate as its prediction.

        Raises:
            ConfigError: levels or a dynamic shift were given.
        """
        if schedule.pop("sigmas", None) is not None or schedule.pop("mu", None) is not None:
            raise ConfigError("EDM schedules take neither sigmas nor mu")
        levels = self.noise_levels(num_steps)[schedule.pop("begin", 0) :]
        solver = EDMEuler(SolverInputs(tuple(as_floats(levels))))
        return _EDMRun(solver, levels[:-1], float(levels[-1]), "euler", device)

    def noise_levels(self, num_steps: int) -> Tensor:
        """Return S + 1 float32 levels, computed in float64 (equation 5 of the paper, or geometric) and rounded; the
        last is 0 or repeats the one before."""
        low, high, rho = self.config["sigma_min"], self.config["sigma_max"], self.config["rho"]
        ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
        if self.config["sigma_schedule"] == "karras":
            levels = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
        else:
            levels = high * (low / high) ** ramp
        levels = levels.float()
        last = levels[-1:] if self.config["final_sigmas_type"] == "sigma_min" else levels.new_zeros(1)
        return torch.cat([levels, last])


class _EDMRun(ScheduleRun):
    """A run whose predictions are estimates of the clean sample, and whose timesteps are the noise levels."""

    def clean(self, prediction: Tensor, index: int, sample: Tensor) -> Tensor:
        """The prediction itself."""
        return prediction


class EDMEuler(EulerSolver):
    """Euler's method on estimates of the clean sample: from x at s to x + (x - x0) / s (s' - s)."""

    def step(self, prediction: Tensor, index: int, sample: Tensor) -> Tensor:
        """See `Solver.step`; `prediction` is the estimate x0."""
        now, after = self.inputs.levels[index : index + 2]
        return sample + (sample - prediction) / now * (after - now)
