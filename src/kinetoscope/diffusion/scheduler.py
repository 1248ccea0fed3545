"""Schedules: the noise levels of diffusers' schedulers, and a private solver for each run.

A `SchedulerAdapter` is a prototype (a class and its configuration). `start` makes a `ScheduleRun`, which owns all
mutable state (multistep history), so that interleaved runs never touch each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
from torch import Tensor

from kinetoscope.core.errors import ConfigError, InputError
from kinetoscope.core.transfer import as_floats, to_device
from kinetoscope.core.types import Noise
from kinetoscope.diffusion.solver import (
    LEVELS,
    SOLVERS,
    Evaluation,
    Solver,
    SolverInputs,
    WithoutNoise,
    make_solver,
    solver_names,
)

SCHEDULERS: dict[str, str] = {
    "unipc": "UniPCMultistepScheduler",
    "euler": "FlowMatchEulerDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "heun": "FlowMatchHeunDiscreteScheduler",
}
"""Built-in solver -> the published class that stands for it in a model directory."""
_SHIFT_FIELD = {
    "UniPCMultistepScheduler": "flow_shift",
    "FlowMatchEulerDiscreteScheduler": "shift",
    "DPMSolverMultistepScheduler": "flow_shift",
}
"""Class whose noise levels are taken -> its configuration field for the shift."""
_LEVEL_SWITCHES = (
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas"
)  # fmt: skip


class SchedulerAdapter:
    """Noise levels and a solver, from which private runs are made.

    Args:
        class_name: a value of `SCHEDULERS`.
        config: the published `scheduler_config.json` fields.
        solver: name of the solver (`diffusion.solver`); None: that of the class.

    Attributes:
        class_name: the class whose noise levels are taken.

    Raises:
        ConfigError: the class or the solver is not known.
    """

    def __init__(self, class_name: str, config: Mapping[str, Any] | None = None, solver: str | None = None) -> None:
        own = next((name for name, known in SCHEDULERS.items() if known == class_name), None)
        if own is None:
            raise ConfigError(f"unknown scheduler {class_name!r}; known: {', '.join(SCHEDULERS.values())}")
        self.solver = solver or own
        if self.solver not in SOLVERS:
            SOLVERS.find(self.solver)
        self.class_name = SCHEDULERS[LEVELS[own]]
        self.config = dict(config or {})

    @property
    def shift(self) -> float:
        """The sigma shift of this configuration."""
        return float(self.config.get(_SHIFT_FIELD[self.class_name], 1.0))

    def override(self, scheduler: str | None = None, shift: float | None = None) -> SchedulerAdapter:
        """Return this prototype with another solver and/or another shift; the rest is kept.

        A solver that takes another class's noise levels keeps the shift and the number of training steps, and is set to
        flow prediction with flow sigmas.

        Raises:
            ConfigError: the solver is not known.
            InputError: a shift is given, and the noise levels of the schedule do not depend on it.
        """
        name = self.class_name
        if scheduler is not None:
            if scheduler not in LEVELS:
                SOLVERS.find(scheduler)
            name = SCHEDULERS[LEVELS[LEVELS[scheduler]]]
        if name == self.class_name:
            config = dict(self.config)
        else:
            config = {"num_train_timesteps": self.config.get("num_train_timesteps", 1000)}
            if _SHIFT_FIELD[name] == "flow_shift":
                config |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        config[_SHIFT_FIELD[name]] = self.shift if shift is None else float(shift)
        chosen = SchedulerAdapter(name, config, scheduler or self.solver)
        if shift is not None and not chosen.reads_shift:
            raise InputError(
                f"flow_shift={shift:g}: the noise levels of this schedule ({name}: {chosen.levels}) do not depend on a "
                f"shift; leave flow_shift out, or choose another scheduler ({', '.join(solver_names())})"
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
        noise: Noise | None = None,
    ) -> ScheduleRun:
        """Return a private run of `num_steps` steps from pure noise.

        Args:
            num_steps: steps of the schedule.
            device: where the timesteps live.
            sigmas: noise levels before the shift, one a step; None: the scheduler's own.
            mu: logarithm of the shift, for a dynamic schedule.
            begin: leave out that many steps at the start (the sample then begins at `sigmas[0]`, not at noise).
            noise: source of the run's random numbers, for solvers that add noise; None where only the levels are read.

        Raises:
            ConfigError: the schedule is dynamic and `mu` is missing.
        """
        if self.dynamic and mu is None:
            raise ConfigError(
                "use_dynamic_shifting=true: this model has no rule for a shift by the size of the video; set "
                "use_dynamic_shifting to false and a fixed shift in scheduler_config.json"
            )
        published = getattr(diffusers, self.class_name).from_config(self.config)
        given = {k: v for k, v in (("sigmas", sigmas), ("mu", mu)) if v is not None}
        published.set_timesteps(num_steps, device="cpu", **given)
        levels = tuple(as_floats(published.sigmas))
        inputs = SolverInputs(levels[begin:], noise or WithoutNoise(), self.config, num_steps)
        solver = make_solver(self.solver, inputs)
        scale = float(self.config.get("num_train_timesteps", 1000))
        times = dict(zip(levels, as_floats(published.timesteps), strict=False))
        found = [times.get(e.level, e.level * scale) for e in solver.evaluations]
        timesteps = torch.tensor(found, dtype=published.timesteps.dtype)
        return ScheduleRun(solver, timesteps, levels[-1], self.solver, device)


class ScheduleRun:
    """The schedule and the solver of one run. One of its steps is one evaluation of the network.

    Args:
        solver: of this run alone.
        timesteps: [E] of its evaluations, on the CPU.
        final: noise level of the result.
        name: name of the solver, for messages.
        device: where the timesteps are needed.

    Attributes:
        timesteps: [E] on the run's device, as the network is given them.
        times: the same as Python numbers; decisions are made on these, so that no step waits for the device.
        evaluations: the solver's step and the noise level of each evaluation.
        sigmas: E + 1 Python floats, the level of each evaluation and the final one.
        stepped: whether `step` was called.
    """

    stepped: bool = False

    def __init__(
        self, solver: Solver, timesteps: Tensor, final: float, name: str = "", device: torch.device | str = "cpu"
    ) -> None:
        self.solver, self.name = solver, name
        self.timesteps = to_device(timesteps, device)
        self.times = as_floats(timesteps)
        self.evaluations: Sequence[Evaluation] = tuple(solver.evaluations)
        self.sigmas = [*(e.level for e in self.evaluations), final]

    def __len__(self) -> int:
        return len(self.times)

    @property
    def starts(self) -> list[int]:
        """The evaluations that begin a step of the solver."""
        steps = [e.step for e in self.evaluations]
        return [i for i, step in enumerate(steps) if i == 0 or step != steps[i - 1]]

    def step(self, prediction: Tensor, index: int, sample: Tensor) -> Tensor:
        """The sample after evaluation `index`, float32: [B, ...] prediction and sample in float32."""
        self.stepped = True
        return self.solver.step(prediction, index, sample)

    def clean(self, prediction: Tensor, index: int, sample: Tensor) -> Tensor:
        """The clean sample that `prediction` stands for at evaluation `index`, float32: all these schedules take flow
        predictions."""
        return sample - self.sigmas[index] * prediction


def check_flow(prototype: SchedulerAdapter, level: float) -> None:
    """Refuse a schedule whose first noise level is none of a flow's, which are in [0, 1].

    Raises:
        ConfigError: names the class and the switches of its configuration.
    """
    if level > 1.0:
        raise ConfigError(
            f"scheduler_config.json: the noise levels of {prototype.class_name} ({prototype.levels}) begin at "
            f"{level:g}; those of a flow are in [0, 1]; set prediction_type to flow_prediction and use_flow_sigmas to "
            "true"
        )


def count_evaluations(solver: str | None, class_name: str | None, steps: int) -> int:
    """Return how often a run of so many steps evaluates the network.

    Args:
        solver: name of the solver; None: that of the published class.
        class_name: published class of the schedule; None or unknown: one evaluation a step.
        steps: steps of the solver.
    """
    name = solver or next((n for n, known in SCHEDULERS.items() if known == class_name), None)
    if name is None:
        return steps
    levels = tuple(1.0 - i / steps for i in range(steps + 1))
    return len(make_solver(name, SolverInputs(levels)).evaluations)
