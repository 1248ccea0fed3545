"""The schedule of few-step students: a fixed list of timesteps, each step a jump to the clean sample.

Distribution matching distillation (arXiv 2405.14867) trains a network for these timesteps alone: a step predicts the
clean sample and noises it again, with fresh noise, for the next one. With two experts (Wan 2.2) the high-noise one
predicts the sample at the boundary instead of the clean one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kinetoscope.core.errors import InputError
from kinetoscope.core.transfer import device_constant, to_device
from kinetoscope.core.types import Noise
from kinetoscope.diffusion.convention import shift_sigma
from kinetoscope.diffusion.scheduler import ScheduleRun
from kinetoscope.diffusion.solver import Evaluation

HIGH_NOISE, LOW_NOISE = 0, 1
TRAIN_STEPS = 1000
"""Timesteps from clean to noise, as few-step schedules count them."""


@dataclass(frozen=True, slots=True)
class FewStepSchedule:
    """Timesteps of a few-step run and the arithmetic between them, for flow prediction v = n - x0.

    Attributes:
        times: what the network is called with at each step.
        sigmas: noise level of each step.
        boundary: noise level between the experts; None: there is one.
        high: steps of the high-noise expert, which are the first.
    """

    times: tuple[float, ...]
    sigmas: tuple[float, ...]
    boundary: float | None = None
    high: int = 0

    @staticmethod
    def make(
        steps: Sequence[int],
        shift: float,
        *,
        warp: bool = False,
        boundary: float | None = None,
        train_steps: int = TRAIN_STEPS,
    ) -> FewStepSchedule:
        """The schedule of a published list.

        Noise levels are read from a table of `train_steps` shifted levels, at the entry nearest in time, as the
        students were trained (float32, as published).

        Args:
            steps: decreasing timesteps in [1, train_steps].
            shift: sigma shift of the table.
            warp: `steps` count from the end of the table: t stands for the shifted time at index train_steps - t.
            boundary: timestep below which the low-noise expert takes over.
            train_steps: length of the table.

        Raises:
            InputError: a list that is empty, not decreasing or out of range, or that leaves the low-noise expert
                without a step.
        """
        if (
            not steps
            or any(type(t) is not int or not 1 <= t <= train_steps for t in steps)
            or any(b >= a for a, b in pairwise(steps))
        ):
            raise InputError(f"few-step timesteps {list(steps)} must be whole, decreasing and in [1, {train_steps}]")
        table = shift_sigma(torch.linspace(1.0, 0.0, train_steps + 1)[:-1], shift)
        timetable = table * train_steps

        def sigma(t: float) -> float:
            return float(table[(timetable.double() - t).abs().argmin()])

        times = tuple(float(timetable[train_steps - t]) if warp else float(t) for t in steps)
        if boundary is None:
            return FewStepSchedule(times, tuple(map(sigma, times)))
        high = sum(t >= boundary for t in times)
        if high == len(times):
            raise InputError(f"few-step timesteps {list(steps)} leave no step below the experts' boundary {boundary:g}")
        return FewStepSchedule(times, tuple(map(sigma, times)), sigma(boundary), high)

    def __len__(self) -> int:
        return len(self.times)

    def expert(self, index: int) -> int:
        """The expert of a step: `HIGH_NOISE` or `LOW_NOISE`; `HIGH_NOISE` where there is one."""
        return LOW_NOISE if self.boundary is not None and index >= self.high else HIGH_NOISE

    def predict(self, index: int, x: Tensor, v: Tensor) -> Tensor:
        """Where the velocity `v` at `x` leads, float32: the clean sample, or for the high-noise expert the sample at
        the boundary. The arithmetic is float64."""
        target = 0.0 if self.boundary is None or index >= self.high else self.boundary
        return (x.double() - (self.sigmas[index] - target) * v.double()).float()

    def renoise(self, index: int, predicted: Tensor, draw: Callable[[], Tensor]) -> Tensor:
        """The sample that step `index` + 1 starts from, float32; the last step's is `predicted` itself.

        `draw` gives standard normal noise of the sample's shape. It is not called where nothing is noised: after the
        last step, and after the high-noise expert's last, whose prediction has the noise of the boundary already.
        """
        if index + 1 == len(self) or (self.boundary is not None and index + 1 == self.high):
            return predicted
        sigma = self.sigmas[index + 1]
        if self.boundary is not None and index + 1 < self.high:  # x at s from x at the boundary b < s
            alpha = (1 - sigma) / (1 - self.boundary)
            return alpha * predicted + (sigma**2 - (alpha * self.boundary) ** 2) ** 0.5 * draw()
        return (1 - sigma) * predicted + sigma * draw()

    def step(self, index: int, x: Tensor, v: Tensor, draw: Callable[[], Tensor]) -> Tensor:
        """The sample after step `index`, float32."""
        return self.renoise(index, self.predict(index, x, v), draw)


class FewStepRun(ScheduleRun):
    """The schedule of one run, with the noise it adds.

    Args:
        schedule: the steps.
        noise: what the run draws fresh noise from.
        device: where the timesteps live.
    """

    def __init__(self, schedule: FewStepSchedule, noise: Noise, device: torch.device | str = "cpu") -> None:
        self.schedule, self.noise = schedule, noise
        self.times = list(schedule.times)
        self.timesteps = device_constant(self.times, device)
        self.sigmas = [*schedule.sigmas, 0.0]
        self.evaluations = [Evaluation(i, s) for i, s in enumerate(schedule.sigmas)]
        self.name = "few-step"

    def step(self, prediction: Tensor, index: int, sample: Tensor) -> Tensor:
        """The sample after step `index`, float32: [B, ...] prediction and sample in float32."""
        shape, device = sample.shape[1:], sample.device
        return self.schedule.step(index, sample, prediction, lambda: to_device(self.noise.draw(shape), device))
