"""Schedulers of diffusers as solvers, for configurations that the solvers of this package do not cover."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import diffusers
import torch
from torch import Tensor

from kinetoscope.diffusion.solver import Evaluation, SolverInputs

_STATE = ("model_outputs", "timestep_list", "lower_order_nums", "last_sample", "this_order", "_step_index")
"""What a scheduler changes in a step."""


class DiffusersSolver:
    """A scheduler of diffusers that is driven by its noise levels, one evaluation a step.

    Each step makes small tensors anew and copies some of them to the device.

    Args:
        class_name: class of diffusers.
        inputs: of the run.
    """

    def __init__(self, class_name: str, inputs: SolverInputs) -> None:
        self.evaluations: Sequence[Evaluation] = [Evaluation(i, s) for i, s in enumerate(inputs.levels[:-1])]
        steps = inputs.total_steps or len(self.evaluations)
        begin = steps - len(self.evaluations)
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        config = {**flow, **inputs.config, "use_dynamic_shifting": False}
        scheduler = getattr(diffusers, class_name).from_config(config)
        scheduler.set_timesteps(steps)
        levels = [min(s, 1.0 - 1e-6) for s in inputs.levels]  # at 1 the logarithm of the signal is infinite
        scheduler.sigmas = torch.tensor([levels[0]] * begin + levels)
        scheduler.set_begin_index(begin)
        self._scheduler: Any = scheduler
        self._times = scheduler.timesteps[begin:]

    def step(self, prediction: Tensor, index: int, sample: Tensor) -> Tensor:
        """See `Solver.step`."""
        return self._scheduler.step(prediction, self._times[index], sample, return_dict=False)[0]

    def state_dict(self) -> dict[str, Any]:
        """Return what the scheduler changes in a step: outputs of earlier steps, the last sample, counters."""
        return {k: deepcopy(getattr(self._scheduler, k)) for k in _STATE if hasattr(self._scheduler, k)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Solver.load_state_dict`."""
        for name, value in state.items():
            setattr(self._scheduler, name, deepcopy(value))
