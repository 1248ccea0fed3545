"""Every built-in solver passes the conformance checks, and a solver that is wrong fails them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from kinetoscope.core.errors import ConfigError
from kinetoscope.diffusion.runge_kutta import EulerSolver, HeunSolver
from kinetoscope.diffusion.scheduler import SchedulerAdapter
from kinetoscope.diffusion.solver import (
    LEVELS,
    SOLVERS,
    Evaluation,
    SolverInputs,
    make_solver,
    register_solver,
    solver_names,
)
from kinetoscope.diffusion.solver_conformance import SolverConformance


class TestEuler(SolverConformance):
    name, order = "euler", 1


class TestHeun(SolverConformance):
    name, order = "heun", 2


class TestUniPC(SolverConformance):
    name, order = "unipc", 2


class TestDPM(SolverConformance):
    name, order = "dpm++", 2


@pytest.fixture
def registry() -> Iterator[None]:
    """Forgets what a test registers."""
    yield
    for name in [n for n in SOLVERS if n.startswith("test-")]:
        del SOLVERS[name], LEVELS[name]


class Midpoint:
    """The midpoint rule: an evaluation at a level that the schedule does not have."""

    def __init__(self, inputs: SolverInputs) -> None:
        self.levels = inputs.levels
        self.evaluations = [
            Evaluation(step, level) for step, (a, b) in enumerate(pairwise(inputs.levels)) for level in (a, (a + b) / 2)
        ]
        self.start: Tensor | None = None

    def step(self, prediction: Tensor, index: int, sample: Tensor) -> Tensor:
        step, second = divmod(index, 2)
        length = self.levels[step + 1] - self.levels[step]
        if not second:
            self.start = sample
            return sample + length / 2 * prediction
        assert self.start is not None
        return self.start + length * prediction

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start}

    def load_state_dict(self, state: Any) -> None:
        self.start = state["start"]


class Ancestral(EulerSolver):
    """Adds fresh noise at every step, as published configurations may ask for."""

    def __init__(self, inputs: SolverInputs) -> None:
        super().__init__(SolverInputs(inputs.levels, inputs.noise, {"stochastic_sampling": True}))


class Shared(HeunSolver):
    """Keeps its memory on the class: runs meet."""

    memory: ClassVar[list[Any]] = [None, None]

    @property
    def start(self) -> Any:
        return self.memory[0]

    @start.setter
    def start(self, value: Any) -> None:
        self.memory[0] = value

    @property
    def velocity(self) -> Any:
        return self.memory[1]

    @velocity.setter
    def velocity(self, value: Any) -> None:
        self.memory[1] = value


class Forgetful(HeunSolver):
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass


class InPlace(EulerSolver):
    def step(self, prediction: Tensor, index: int, sample: Tensor) -> Tensor:
        now, after = self.inputs.levels[index : index + 2]
        return sample.add_(prediction, alpha=after - now)


class Short(EulerSolver):
    def step(self, prediction: Tensor, index: int, sample: Tensor) -> Tensor:
        now, after = self.inputs.levels[index : index + 2]
        return sample + 0.9 * (after - now) * prediction


class Sloppy(EulerSolver):
    def step(self, prediction: Tensor, index: int, sample: Tensor) -> Tensor:
        return super().step(prediction, index, sample).double()


def suite(factory: Any, order: float | None) -> SolverConformance:
    register_solver("test-solver", factory)
    kind = type("Suite", (SolverConformance,), {"name": "test-solver", "order": order})
    return kind()


def failures(factory: Any, order: float | None) -> set[str]:
    checks, failed = suite(factory, order), set[str]()
    for name in (n for n in dir(checks) if n.startswith("test_")):
        try:
            getattr(checks, name)()
        except AssertionError:
            failed.add(name)
    return failed


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(("factory", "order"), [(Midpoint, 2), (Ancestral, None)])
def test_conformance_accepts_solvers_of_other_kinds(factory: Any, order: float | None) -> None:
    assert failures(factory, order) == set()


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("factory", "order", "expected"),
    [
        (EulerSolver, 2, "test_error_falls_with_the_order_of_the_solver"),
        (Shared, 2, "test_interleaved_runs_are_independent"),
        (Forgetful, 2, "test_run_resumes_from_its_state_at_every_evaluation"),
        (InPlace, 1, "test_tensors_are_float32_and_the_given_ones_stay"),
        (Short, 1, "test_last_level_is_reached"),
        (Sloppy, 1, "test_tensors_are_float32_and_the_given_ones_stay"),
        (Ancestral, 1, "test_same_seed_gives_the_same_sample"),
    ],
)
def test_conformance_refuses_wrong_solvers(factory: Any, order: float, expected: str) -> None:
    assert expected in failures(factory, order)


@pytest.mark.usefixtures("registry")
def test_register_solver_refuses_bad_entries() -> None:
    for arguments, message in (
        (("two words", EulerSolver), "may have letters"),
        (("euler", EulerSolver), "built-in"),
        (("test-x", "no colon"), "module:name"),
        (("test-x", 3), "module:name"),
    ):
        with pytest.raises(ConfigError, match=message):
            register_solver(*arguments)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="levels='ddim' is not one of"):
        register_solver("test-x", EulerSolver, levels="ddim")
    assert "test-x" not in solver_names()


@pytest.mark.usefixtures("registry")
def test_registered_place_is_imported_on_first_use_and_refused_by_name() -> None:
    register_solver("test-good", f"{__name__}:Midpoint")
    register_solver("test-gone", "no.such.module:Solver")
    adapter = SchedulerAdapter("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
    run = adapter.override("test-good").start(4)
    assert len(run) == 8 and run.starts == [0, 2, 4, 6]
    assert run.times[1] == pytest.approx(1000 * (run.sigmas[0] + run.sigmas[2]) / 2)
    with pytest.raises(ConfigError, match=r"test-gone was registered as 'no.such.module:Solver'"):
        adapter.override("test-gone").start(4)


@pytest.mark.usefixtures("registry")
def test_solver_without_a_method_is_refused_by_name() -> None:
    class Half:
        evaluations = (Evaluation(0, 1.0),)

        def step(self, prediction: Tensor, index: int) -> Tensor:
            return prediction

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: Any) -> None: ...

    register_solver("test-half", lambda inputs: Half())  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=r"Half.step\(prediction, index\) cannot be called as Solver asks: step\("):
        make_solver("test-half", SolverInputs((1.0, 0.0)))
    register_solver("test-late", lambda inputs: EulerSolver(SolverInputs(inputs.levels[1:])))
    with pytest.raises(ConfigError, match="should begin at the first noise level"):
        make_solver("test-late", SolverInputs((1.0, 0.5, 0.0)))


def test_heun_is_exact_where_the_velocity_is_linear_in_the_level() -> None:
    """dx/ds = s from 1 to 0.5: x changes by (0.25 - 1) / 2."""
    solver = HeunSolver(SolverInputs((1.0, 0.5, 0.0)))
    x = torch.zeros(1, 2)
    for index, evaluation in enumerate(solver.evaluations[:2]):
        x = solver.step(torch.full_like(x, evaluation.level), index, x)
    assert x.tolist() == [[-0.375, -0.375]]
    assert [e.step for e in solver.evaluations] == [0, 0, 1] and math.isclose(solver.evaluations[2].level, 0.5)
