"""Runge-Kutta solvers of flows: Euler's and Heun's methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from kinetoscope.core.transfer import to_device
from kinetoscope.diffusion.solver import Evaluation, SolverInputs


class EulerSolver:
    """Euler's method, one evaluation a step: x(s') = x(s) + (s' - s) v.

    Where the published configuration says `stochastic_sampling`, a step goes to the clean estimate instead and adds
    fresh noise of the next level.
    """

    def __init__(self, inputs: SolverInputs) -> None:
        self.inputs = inputs
        self.evaluations: Sequence[Evaluation] = [Evaluation(i, s) for i, s in enumerate(inputs.levels[:-1])]

    def step(self, prediction: Tensor, index: int, sample: Tensor) -> Tensor:
        """See `Solver.step`."""
        now, after = self.inputs.levels[index : index + 2]
        if self.inputs.config.get("stochastic_sampling"):
            noise = to_device(self.inputs.noise.draw(sample.shape[1:]), sample.device)
            return (1.0 - after) * (sample - now * prediction) + after * noise
        return sample + (after - now) * prediction

    def state_dict(self) -> dict[str, Any]:
        """Return an empty dictionary: a step depends on the sample alone."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing."""


class HeunSolver:
    """Heun's method, two evaluations a step: x(s') = x(s) + (s' - s) (v + v') / 2, where v' is the velocity at the
    sample that an Euler step reaches (Karras et al., arXiv 2206.00364, algorithm 1 without churn).

    The last step ends where there is no noise, so that it is Euler's: S steps take 2 S - 1 evaluations.
    """

    def __init__(self, inputs: SolverInputs) -> None:
        self.levels = inputs.levels
        found: list[Evaluation] = []
        for step, (now, after) in enumerate(pairwise(inputs.levels)):
            found.append(Evaluation(step, now))
            if step + 2 < len(inputs.levels):
                found.append(Evaluation(step, after))
        self.evaluations: Sequence[Evaluation] = found
        self.start: Tensor | None = None
        self.velocity: Tensor | None = None

    def step(self, prediction: Tensor, index: int, sample: Tensor) -> Tensor:
        """See `Solver.step`."""
        step = self.evaluations[index].step
        length = self.levels[step + 1] - self.levels[step]
        if self.start is not None and self.velocity is not None:
            moved = self.start + length * (0.5 * (self.velocity + prediction))
            self.start = self.velocity = None
            return moved
        if index + 1 < len(self.evaluations):
            self.start, self.velocity = sample, prediction
        return sample + length * prediction

    def state_dict(self) -> dict[str, Any]:
        """Return the sample [B, ...] and the velocity [B, ...] at the start of a step that is half done, else None."""
        return {k: None if v is None else v.clone() for k, v in (("start", self.start), ("velocity", self.velocity))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Solver.load_state_dict`."""
        self.start, self.velocity = state["start"], state["velocity"]
