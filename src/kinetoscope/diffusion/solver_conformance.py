"""Checks that every solver must pass, as a class whose `test_` methods pytest collects from a subclass.

    class TestMidpoint(SolverConformance):
        name = "midpoint"
        order = 2

The checks integrate flows whose solution is known in closed form: data of a normal distribution N(m, c^2), noise of
N(0, 1), so that x_s = (1 - s) x0 + s n is normal with mean (1 - s) m and variance V(s) = (1 - s)^2 c^2 + s^2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from kinetoscope.diffusion.noise import NoiseSource, generator_for, randn
from kinetoscope.diffusion.scheduler import SchedulerAdapter
from kinetoscope.diffusion.solver import Solver, SolverInputs, make_solver

MEAN, SHAPE = 0.7, (2, 3, 2, 4, 4)


def velocity(x: Tensor, s: float, deviation: float) -> Tensor:
    """Return E[n - x0 | x_s = x] of the normal data, [B, ...] like `x`."""
    covariance = s - (1 - s) * deviation**2
    return covariance / variance(s, deviation) * (x - (1 - s) * MEAN) - MEAN


def variance(s: float, deviation: float) -> float:
    """Return V(s)."""
    return (1 - s) ** 2 * deviation**2 + s**2


def exact(x: Tensor, start: float, stop: float, deviation: float) -> Tensor:
    """Return where the flow leads `x` from the noise level `start` to `stop`."""
    scale = math.sqrt(variance(stop, deviation) / variance(start, deviation))
    return (1 - stop) * MEAN + scale * (x - (1 - start) * MEAN)


class CountedNoise:
    """Noise of a seed whose place can be set: draw k of the source is always the same."""

    def __init__(self, seed: int, place: int = 0) -> None:
        self.seed, self.place = seed, place

    def draw(self, shape: Sequence[int]) -> Tensor:
        """Return the next draw [2, *shape]."""
        self.place += 1
        return NoiseSource([self.seed, self.seed + 1]).fork(self.place).draw(shape)

    def fork(self, *key: int) -> CountedNoise:
        """Return an independent source."""
        return CountedNoise(hash((self.seed, *key)) % 2**31)


class SolverConformance:
    """The checks; a subclass names the solver.

    Class attributes:
        name: as registered by `register_solver`.
        order: order of convergence p, so that the error falls as (1 / steps)^p; None: the solver adds noise, and has no
            order on a single path.
        steps: of the runs that are compared bit for bit.
    """

    name: ClassVar[str]
    order: ClassVar[float | None] = 1
    steps: ClassVar[int] = 6

    def levels(self, steps: int, start: float = 1.0, stop: float = 0.0) -> tuple[float, ...]:
        """Return S + 1 noise levels that fall evenly."""
        return tuple(start + (stop - start) * i / steps for i in range(steps + 1))

    def make(self, levels: Sequence[float], noise: CountedNoise | None = None) -> Solver:
        """Return a new solver for the levels."""
        return make_solver(self.name, SolverInputs(tuple(levels), noise or CountedNoise(0)))

    def start(self, seed: int = 0) -> Tensor:
        """Return a sample [2, 3, 2, 4, 4] of standard normal numbers."""
        return randn(SHAPE, generator_for(seed))

    def follow(self, solver: Solver, x: Tensor, deviation: float = 1.0, begin: int = 0) -> Tensor:
        """Return where a solver leads `x` along the closed-form flow, from evaluation `begin` on."""
        for index in range(begin, len(solver.evaluations)):
            x = solver.step(velocity(x, solver.evaluations[index].level, deviation), index, x)
        return x

    # -- evaluations --------------------------------------------------------------------------------------------------

    def test_evaluations_name_every_step_and_stay_between_the_levels(self) -> None:
        """Every step has an evaluation, in order, at levels between the first and the last."""
        levels = self.levels(self.steps)
        found = self.make(levels).evaluations
        assert sorted({e.step for e in found}) == list(range(self.steps))
        assert [e.step for e in found] == sorted(e.step for e in found)
        assert all(levels[-1] <= e.level <= levels[0] for e in found)

    def test_evaluations_begin_where_the_schedule_of_a_model_begins(self) -> None:
        """A schedule of a model starts with this solver; its first evaluation is at the first level."""
        run = SchedulerAdapter("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}).override(self.name).start(self.steps)
        assert len(run) == len(run.times) == len(run.timesteps) == len(run.sigmas) - 1
        assert all(a >= b for a, b in pairwise(run.times))

    # -- numbers ------------------------------------------------------------------------------------------------------

    def test_error_falls_with_the_order_of_the_solver(self) -> None:
        """The error at 40 steps is that at 20 divided by 2^order, within a quarter of an order."""
        if self.order is None:
            return
        errors: list[float] = []
        for steps in (20, 40):
            levels = self.levels(steps, 0.9, 0.1)
            x = self.start()
            reached = self.follow(self.make(levels), x, deviation=0.5)
            errors.append(float((reached - exact(x, 0.9, 0.1, 0.5)).abs().max()))
        found = math.log2(errors[0] / errors[1])
        assert found > self.order - 0.25, f"errors {errors} at 20 and 40 steps: order {found:.2f}, not {self.order}"

    def test_last_level_is_reached(self) -> None:
        """Where all data is one point, the paths are straight and every solver ends on the point."""
        levels = self.levels(self.steps)
        reached = self.follow(self.make(levels), self.start(), deviation=0.0)
        assert (reached - MEAN).abs().max() < 1e-4

    def test_tensors_are_float32_and_the_given_ones_stay(self) -> None:
        """float32 goes in and comes out, with the shape of the sample; no tensor of the caller is written to."""
        solver = self.make(self.levels(self.steps))
        x = self.start()
        for index, evaluation in enumerate(solver.evaluations):
            prediction = velocity(x, evaluation.level, 1.0)
            before = x.clone(), prediction.clone()
            reached = solver.step(prediction, index, x)
            assert reached.dtype == torch.float32 and reached.shape == x.shape
            assert torch.equal(x, before[0]) and torch.equal(prediction, before[1])
            x = reached

    def test_parts_of_a_sample_move_alone_as_together(self) -> None:
        """A model may hand in some frames only: each element moves by itself (solvers without noise)."""
        if self.order is None:
            return
        levels, x = self.levels(self.steps), self.start()
        whole = self.follow(self.make(levels), x)
        part = self.follow(self.make(levels), x[:1, :, 1:])
        assert (whole[:1, :, 1:] - part).abs().max() < 1e-5

    # -- state --------------------------------------------------------------------------------------------------------

    def test_same_seed_gives_the_same_sample(self) -> None:
        """Two runs of the same noise are equal bit for bit; a solver that adds noise differs at another seed."""
        levels, x = self.levels(self.steps), self.start()
        one, two, other = (self.follow(self.make(levels, CountedNoise(seed)), x) for seed in (1, 1, 2))
        assert torch.equal(one, two)
        assert torch.equal(one, other) == (self.order is not None)

    def test_interleaved_runs_are_independent(self) -> None:
        """Two runs that take their steps in turn are those of each alone, bit for bit."""
        levels, starts = self.levels(self.steps), [self.start(1), self.start(2)]
        alone = [self.follow(self.make(levels, CountedNoise(i)), x) for i, x in enumerate(starts)]
        solvers = [self.make(levels, CountedNoise(i)) for i in range(2)]
        for index, evaluation in enumerate(solvers[0].evaluations):
            for i, solver in enumerate(solvers):
                starts[i] = solver.step(velocity(starts[i], evaluation.level, 1.0), index, starts[i])
        assert all(torch.equal(a, b) for a, b in zip(alone, starts, strict=True))

    def test_run_resumes_from_its_state_at_every_evaluation(self) -> None:
        """A new solver with the copied state goes on bit for bit, whatever the first one did since."""
        levels, x = self.levels(self.steps), self.start()
        noise = CountedNoise(3)
        first = self.make(levels, noise)
        kept: list[tuple[Tensor, dict[str, Any], int]] = []
        for index, evaluation in enumerate(first.evaluations):
            kept.append((x.clone(), first.state_dict(), noise.place))
            x = first.step(velocity(x, evaluation.level, 1.0), index, x)
        for index, (sample, state, place) in enumerate(kept):
            assert _plain(state), f"state_dict() should hold tensors, numbers and lists of them only: {state}"
            second = self.make(levels, CountedNoise(3, place))
            second.load_state_dict(state)
            assert torch.equal(self.follow(second, sample, begin=index), x), f"resumed at evaluation {index}"


def _plain(value: object) -> bool:
    """Return whether a state consists of tensors, numbers, texts, None, and lists and dictionaries of them."""
    if isinstance(value, Mapping):
        return all(_plain(v) for v in cast(Mapping[str, object], value).values())
    if isinstance(value, (list, tuple)):
        return all(_plain(v) for v in cast(Sequence[object], value))
    return value is None or isinstance(value, (Tensor, int, float, str))
