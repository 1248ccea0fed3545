"""Sampling in the noise levels of EDM (arXiv 2206.00364): Euler steps from sigma_max down, on clean estimates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kinetoscope.core.errors import ConfigError, InputError
from kinetoscope.diffusion.scheduler import SchedulerAdapter, ScheduleRun, as_floats

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
        self.class_name = "EDMEulerScheduler"
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
        """A private run of `num_steps` steps; `ScheduleRun.step` takes the clean estimate as its prediction.

        Raises:
            ConfigError: levels or a dynamic shift were given.
        """
        if schedule.pop("sigmas", None) is not None or schedule.pop("mu", None) is not None:
            raise ConfigError("EDM schedules take neither sigmas nor mu")
        return _EDMRun(_EDMEuler(self.config), num_steps, torch.device(device), **schedule)


class _EDMRun(ScheduleRun):
    """A run whose predictions are estimates of the clean sample."""

    def clean(self, prediction: Tensor, index: int, sample: Tensor) -> Tensor:
        """The prediction itself."""
        return prediction


class _EDMEuler:
    """One Euler solver, in the form that `ScheduleRun` drives. `timesteps` are the noise levels themselves."""

    timesteps: Tensor
    sigmas: Tensor

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self._index = 0

    def set_timesteps(self, num_inference_steps: int, device: torch.device, **schedule: Any) -> None:
        """Levels in float64 (equation 5 of the paper, or geometric), then rounded; the last is 0 or repeats."""
        low, high, rho = self.config["sigma_min"], self.config["sigma_max"], self.config["rho"]
        ramp = torch.linspace(0, 1, num_inference_steps, dtype=torch.float64)
        if self.config["sigma_schedule"] == "karras":
            levels = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
        else:
            levels = high * (low / high) ** ramp
        levels = levels.float()
        last = levels[-1:] if self.config["final_sigmas_type"] == "sigma_min" else levels.new_zeros(1)
        self.sigmas = torch.cat([levels, last])
        self.timesteps = levels.to(device)

    def set_begin_index(self, begin_index: int) -> None:
        self._index = begin_index

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool) -> tuple[Tensor, ...]:
        """From x at s to x + (x - x0) / s (s' - s)."""
        now, after = as_floats(self.sigmas[self._index : self._index + 2])
        self._index += 1
        return (sample + (sample - model_output) / now * (after - now),)
