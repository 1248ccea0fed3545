"""UniPC and DPM-Solver++ against diffusers' schedulers, step by step on the same predictions."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from kinetoscope.diffusion.diffusers_solver import DiffusersSolver
from kinetoscope.diffusion.multistep import DPMSolver, UniPCSolver, make_dpm, make_unipc
from kinetoscope.diffusion.scheduler import SchedulerAdapter, ScheduleRun
from kinetoscope.diffusion.solver import SolverInputs

FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
COSMOS = {"use_karras_sigmas": True, "use_flow_sigmas": True, "prediction_type": "flow_prediction",
          "sigma_max": 200.0, "sigma_min": 0.01, "final_sigmas_type": "zero"}  # Predict 2.5, as published  # fmt: skip
UNIPC, DPM = "UniPCMultistepScheduler", "DPMSolverMultistepScheduler"
SHAPE = (2, 3, 2, 5, 7)
THIRD_ORDER = 1e-6
"""Largest relative difference where diffusers sums two products in a matrix product (third order)."""


def draw(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Draws:
    """A source of noise whose draws are known."""

    def __init__(self) -> None:
        self.count = 0

    def draw(self, shape: Any) -> Tensor:
        self.count += 1
        return draw(1000 + self.count, (SHAPE[0], *shape))

    def fork(self, *key: int) -> Draws:
        return self


def trajectories(
    name: str, config: dict[str, Any], steps: int, begin: int = 0, **schedule: Any
) -> list[tuple[Any, Any]]:
    """Return the sample after each step, ours and diffusers', for predictions that depend on the sample."""
    run = SchedulerAdapter(name, config).start(steps, begin=begin, noise=Draws(), **schedule)
    oracle = getattr(diffusers, name).from_config(config)
    oracle.set_timesteps(steps, **schedule)
    oracle.set_begin_index(begin)
    noise = Draws()
    more: dict[str, Any] = {}
    found: list[tuple[Any, Any]] = []
    ours = theirs = draw(0)
    for index in range(len(run)):
        field = draw(index + 1)
        if str(config.get("algorithm_type")).startswith("sde"):
            more = {"variance_noise": noise.draw(SHAPE[1:])}
        ours = run.step(torch.tanh(ours) + field, index, ours)
        time = oracle.timesteps[begin + index]
        theirs = oracle.step(torch.tanh(theirs) + field, time, theirs, return_dict=False, **more)[0]
        found.append((ours, theirs))
    return found


def check(found: list[tuple[Any, Any]], tolerance: float = 0.0) -> None:
    for ours, theirs in found:
        assert torch.isfinite(theirs).all()
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("kind", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_equals_diffusers(order: int, kind: str, steps: int) -> None:
    final = "zero" if kind == "bh2" else "sigma_min"  # diffusers' own last step to level 0 gives NaN with bh1
    config = FLOW | {"solver_order": order, "solver_type": kind, "final_sigmas_type": final}
    check(trajectories(UNIPC, config, steps), THIRD_ORDER if order == 3 else 0.0)


@pytest.mark.parametrize(
    ("config", "begin"),
    [
        (FLOW, 3),
        (FLOW | {"disable_corrector": [0, 3]}, 0),
        (FLOW | {"disable_corrector": [4]}, 3),
        (FLOW | {"lower_order_final": False, "final_sigmas_type": "sigma_min"}, 0),
        (FLOW | {"solver_type": "heun"}, 0),
        (COSMOS, 0),
        (COSMOS | {"final_sigmas_type": "sigma_min"}, 2),
        (FLOW | {"shift_terminal": 0.1}, 0),
    ],
)
def test_unipc_equals_diffusers_in_other_configurations(config: dict[str, Any], begin: int) -> None:
    check(trajectories(UNIPC, config, 8, begin))


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 14, 15, 20])
@pytest.mark.parametrize(("order", "kind"), [(1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint")])
def test_dpm_equals_diffusers(order: int, kind: str, steps: int) -> None:
    check(trajectories(DPM, FLOW | {"solver_order": order, "solver_type": kind}, steps))


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize(
    ("changes", "begin"),
    [
        ({}, 3),
        ({"lower_order_final": False}, 0),
        ({"lower_order_final": False, "euler_at_final": True, "solver_order": 3}, 0),
        ({"solver_type": "bh2"}, 0),
    ],
)
def test_dpm_equals_diffusers_in_other_configurations(changes: dict[str, Any], begin: int, final: str) -> None:
    check(trajectories(DPM, FLOW | {"final_sigmas_type": final} | changes, 8, begin))


@pytest.mark.parametrize(("order", "kind"), [(1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint")])
def test_sde_dpm_draws_the_noise_of_the_run_and_equals_diffusers(order: int, kind: str) -> None:
    config = FLOW | {"algorithm_type": "sde-dpmsolver++", "solver_order": order, "solver_type": kind}
    check(trajectories(DPM, config, 7))


@pytest.mark.parametrize("name", [UNIPC, DPM])
def test_dynamic_shifts_equal_diffusers(name: str) -> None:
    check(trajectories(name, FLOW | {"use_dynamic_shifting": True}, 5, mu=1.3))


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (make_unipc, {"predict_x0": False}),
        (make_unipc, {"thresholding": True}),
        (make_unipc, {"use_flow_sigmas": False, "prediction_type": "epsilon"}),
        (make_dpm, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    ],
)
def test_configurations_that_are_not_covered_are_left_to_diffusers(
    make: Callable[[SolverInputs], Any], config: dict[str, Any]
) -> None:
    assert isinstance(make(SolverInputs((0.9, 0.5, 0.1), config=config)), DiffusersSolver)


@pytest.mark.parametrize(("name", "kind"), [(UNIPC, UniPCSolver), (DPM, DPMSolver)])
def test_saved_state_continues_bit_for_bit(name: str, kind: type) -> None:
    def steps(run: ScheduleRun, sample: Tensor, places: range) -> Tensor:
        for index in places:
            sample = run.step(draw(index + 1), index, sample)
        return sample

    whole, first, second = (SchedulerAdapter(name, FLOW | {"solver_order": 3}).start(6) for _ in range(3))
    assert isinstance(whole.solver, kind)
    half = steps(first, draw(0), range(3))
    second.solver.load_state_dict(first.solver.state_dict())
    assert torch.equal(steps(second, half, range(3, 6)), steps(whole, draw(0), range(6)))


def test_parts_of_a_sample_step_alone() -> None:
    """A strategy may hand a solver some of the frames."""
    for name, frames in itertools.product((UNIPC, DPM), (slice(0, 1), slice(1, 2))):
        whole, part = (SchedulerAdapter(name, FLOW).start(4) for _ in range(2))
        x = draw(0)
        y = x[:, :, frames]
        for index in range(4):
            v = draw(index + 1)
            x, y = whole.step(v, index, x), part.step(v[:, :, frames], index, y)
        assert torch.equal(x[:, :, frames], y)
