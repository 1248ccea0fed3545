"""Schedulers: diffusers' arithmetic, one private instance a run.

A `SchedulerAdapter` is a prototype (a class and its configuration). `start` makes a `ScheduleRun`, which owns all
mutable state (step index, multistep history), so that interleaved runs never touch each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import diffusers
import torch
from torch import Tensor

from kinetoscope.core.errors import ConfigError, InputError

SCHEDULERS: dict[str, str] = {
    "unipc": "UniPCMultistepScheduler",
    "euler": "FlowMatchEulerDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
}
_SHIFT_FIELD = {
    "UniPCMultistepScheduler": "flow_shift",
    "FlowMatchEulerDiscreteScheduler": "shift",
    "DPMSolverMultistepScheduler": "flow_shift",
}
_LEVEL_SWITCHES = (
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas"
)  # fmt: skip


class _DiffusersScheduler(Protocol):
    """The part of a diffusers scheduler that a run uses."""

    timesteps: Tensor
    sigmas: Tensor
    config: Mapping[str, Any]

    def set_timesteps(self, num_inference_steps: int, device: torch.device, **schedule: Any) -> None: ...
    def set_begin_index(self, begin_index: int) -> None: ...
    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool) -> tuple[Tensor, ...]: ...


class SchedulerAdapter:
    """A scheduler class and configuration from which private runs are made.

    Args:
        class_name: a value of `SCHEDULERS`.
        config: the published `scheduler_config.json` fields.

    Raises:
        ConfigError: the class is not known.
    """

    def __init__(self, class_name: str, config: Mapping[str, Any] | None = None) -> None:
        if class_name not in _SHIFT_FIELD:
            raise ConfigError(f"unknown scheduler {class_name!r}; known: {', '.join(SCHEDULERS.values())}")
        self.class_name = class_name
        self.config = dict(config or {})

    @property
    def shift(self) -> float:
        """The sigma shift of this configuration."""
        return float(self.config.get(_SHIFT_FIELD[self.class_name], 1.0))

    def override(self, scheduler: str | None = None, shift: float | None = None) -> SchedulerAdapter:
        """This prototype with another solver (a key of `SCHEDULERS`) and/or another shift; the rest is kept.

        A new solver keeps the shift and the number of training steps, and is set to flow prediction with flow sigmas.

        Raises:
            ConfigError: the solver is not known.
            InputError: a shift is given, and the noise levels of the schedule do not depend on it.
        """
        name = self.class_name
        if scheduler is not None:
            if scheduler not in SCHEDULERS:
                raise ConfigError(f"unknown scheduler {scheduler!r}; known: {', '.join(SCHEDULERS)}")
            name = SCHEDULERS[scheduler]
        if name == self.class_name:
            config = dict(self.config)
        else:
            config = {"num_train_timesteps": self.config.get("num_train_timesteps", 1000)}
            if _SHIFT_FIELD[name] == "flow_shift":
                config |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        config[_SHIFT_FIELD[name]] = self.shift if shift is None else float(shift)
        chosen = SchedulerAdapter(name, config)
        if shift is not None and not chosen.reads_shift:
            raise InputError(
                f"flow_shift={shift:g}: the noise levels of this schedule ({name}: {chosen.levels}) do not depend on a "
                f"shift; leave flow_shift out, or choose another scheduler ({', '.join(SCHEDULERS)})"
            )
        return chosen

    @property
    def reads_shift(self) -> bool:
        """Whether the noise levels depend on the shift. Karras, exponential and beta levels of some solvers do not.

        The levels of two shifts are compared, so that no rule of a solver is repeated here.
        """
        low, high = (
            SchedulerAdapter(self.class_name, {**self.config, _SHIFT_FIELD[self.class_name]: shift})
            .start(3, mu=0.0 if self.dynamic else None)
            .sigmas
            for shift in (1.0, 9.0)
        )
        return self.dynamic or low != high

    @property
    def levels(self) -> str:
        """The switches of the configuration that choose the noise levels, for messages."""
        chosen = [name for name in _LEVEL_SWITCHES if self.config.get(name)]
        return ", ".join(chosen) or f"none of {', '.join(_LEVEL_SWITCHES)}"

    @property
    def dynamic(self) -> bool:
        """Whether the shift depends on the size of the video, so that `start` needs `mu`."""
        return bool(self.config.get("use_dynamic_shifting", False))

    def start(
        self,
        num_steps: int,
        device: torch.device | str = "cpu",
        *,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        begin: int = 0,
    ) -> ScheduleRun:
        """A private run of `num_steps` steps from pure noise.

        Args:
            num_steps: of the schedule.
            device: where the timesteps live.
            sigmas: noise levels before the shift, one a step; None: the scheduler's own.
            mu: logarithm of the shift, for a dynamic schedule.
            begin: leave out that many steps at the start (the sample then begins at `sigmas[0]`, not at noise).

        Raises:
            ConfigError: the schedule is dynamic and `mu` is missing.
        """
        if self.dynamic and mu is None:
            raise ConfigError(
                "use_dynamic_shifting=true: this model has no rule for a shift by the size of the video; set "
                "use_dynamic_shifting to false and a fixed shift in scheduler_config.json"
            )
        scheduler = getattr(diffusers, self.class_name).from_config(self.config)
        given = {k: v for k, v in (("sigmas", sigmas), ("mu", mu)) if v is not None}
        return ScheduleRun(scheduler, num_steps, torch.device(device), begin=begin, **given)


class ScheduleRun:
    """The schedule and the solver state of one run.

    Attributes:
        timesteps: [S] on the run's device, as the scheduler gives them to the network.
        times: the same as Python numbers; decisions are made on these, so that no step waits for the device.
        sigmas: S + 1 Python floats, the last is the final noise level.
    """

    def __init__(
        self,
        scheduler: _DiffusersScheduler,
        num_steps: int,
        device: torch.device,
        *,
        begin: int = 0,
        **schedule: Any,
    ) -> None:
        scheduler.set_timesteps(num_steps, device=device, **schedule)
        scheduler.set_begin_index(begin)
        self._scheduler = scheduler
        self.timesteps: Tensor = scheduler.timesteps[begin:]
        self.times = as_floats(self.timesteps)
        self.sigmas = as_floats(scheduler.sigmas[begin:])

    def __len__(self) -> int:
        return len(self.times)

    def step(self, prediction: Tensor, index: int, sample: Tensor) -> Tensor:
        """The sample after step `index`, float32: [B, ...] prediction and sample in float32."""
        return self._scheduler.step(prediction, self.timesteps[index], sample, return_dict=False)[0]

    def clean(self, prediction: Tensor, index: int, sample: Tensor) -> Tensor:
        """The clean sample that `prediction` stands for at step `index`, float32: all these schedules take flow
        predictions."""
        return sample - self.sigmas[index] * prediction


def as_floats(values: Tensor) -> list[float]:
    """A 1-D tensor as Python numbers."""
    return [float(v) for v in values]
