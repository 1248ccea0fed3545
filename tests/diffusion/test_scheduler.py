"""Schedules are those of diffusers, and private to a run."""

from __future__ import annotations

from importlib.util import find_spec

import diffusers
import pytest
import torch

from kinetoscope.core.errors import ConfigError, InputError
from kinetoscope.diffusion.noise import NoiseSource
from kinetoscope.diffusion.scheduler import SCHEDULERS, SchedulerAdapter, count_evaluations

FLOW = {
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
    "num_train_timesteps": 1000,
}


def prototype(name: str) -> SchedulerAdapter:
    return SchedulerAdapter("UniPCMultistepScheduler", FLOW).override(name)


def network(x: torch.Tensor, t: float) -> torch.Tensor:
    return torch.tanh(x) * (t / 1000) - 0.3 * x


def follow(name: str, start: torch.Tensor, steps: int = 8) -> torch.Tensor:
    run = prototype(name).start(steps)
    for i, t in enumerate(run.times):
        start = run.step(network(start, t), i, start)
    return start


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_run_is_that_of_diffusers(name: str) -> None:
    x = NoiseSource([0]).draw((4, 2, 3, 3))
    config = {"shift": 3.0} if name in ("euler", "heun") else FLOW
    oracle = getattr(diffusers, SCHEDULERS[name])(**config)
    oracle.set_timesteps(8)
    expected = x
    for t in oracle.timesteps:
        expected = oracle.step(network(expected, float(t)), t, expected, return_dict=False)[0]
    if name == "heun":  # diffusers divides by the level and multiplies again
        torch.testing.assert_close(follow(name, x), expected, rtol=0, atol=1e-5)
    else:
        assert torch.equal(follow(name, x), expected)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_interleaved_runs_do_not_touch_each_other(name: str) -> None:
    starts = [NoiseSource([s]).draw((4, 2, 3, 3)) for s in (1, 2)]
    alone = [follow(name, x) for x in starts]
    maker = prototype(name)
    runs = [maker.start(8), maker.start(8)]
    for i in range(len(runs[0])):
        for k, run in enumerate(runs):
            starts[k] = run.step(network(starts[k], run.times[i]), i, starts[k])
    assert all(torch.equal(a, b) for a, b in zip(starts, alone, strict=True))


def test_override_keeps_the_shift_across_solvers() -> None:
    adapter = SchedulerAdapter("FlowMatchEulerDiscreteScheduler", {"shift": 5.0, "num_train_timesteps": 1000})
    for name in SCHEDULERS:
        assert adapter.override(name).shift == 5.0
        assert adapter.override(name, shift=8.0).shift == 8.0
    assert adapter.shift == 5.0


def test_schedule_as_numbers() -> None:
    run = prototype("unipc").start(6)
    assert len(run) == len(run.times) == 6
    assert len(run.sigmas) == 7
    assert run.sigmas[-1] == 0.0
    assert run.times == [float(t) for t in run.timesteps]


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(ConfigError, match="euler, heun, unipc"):
        prototype("ddim")
    with pytest.raises(ConfigError, match="FlowMatchEuler"):
        SchedulerAdapter("DDIMScheduler")


@pytest.mark.parametrize(
    "switch",
    [
        "use_karras_sigmas",
        "use_exponential_sigmas",
        pytest.param("use_beta_sigmas", marks=pytest.mark.skipif(find_spec("scipy") is None, reason="needs scipy")),
    ],
)
@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler"])
def test_shift_is_refused_when_the_levels_do_not_read_it(name: str, switch: str) -> None:
    adapter = SchedulerAdapter(name, {"prediction_type": "flow_prediction", "use_flow_sigmas": True, switch: True})
    for shift in (1.0, 9.0):
        with pytest.raises(InputError, match=rf"flow_shift={shift:g}: the noise levels .*{name}: {switch}"):
            adapter.override(shift=shift)
    assert adapter.override().start(3).sigmas == adapter.start(3).sigmas
    assert adapter.override("euler", 9.0).shift == 9.0


def test_shift_is_refused_when_the_solver_does_not_take_flow_levels() -> None:
    adapter = SchedulerAdapter("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"})
    with pytest.raises(InputError, match=r"flow_shift=5.*none of use_karras_sigmas"):
        adapter.override(shift=5.0)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_shift_changes_the_levels_of_every_solver(name: str) -> None:
    assert prototype(name).override(shift=1.0).start(3).sigmas != prototype(name).override(shift=9.0).start(3).sigmas


def test_euler_reads_the_shift_with_karras_levels_too() -> None:
    adapter = SchedulerAdapter("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True})
    assert adapter.override(shift=1.0).start(3).sigmas != adapter.override(shift=9.0).start(3).sigmas


def test_dynamic_schedule_without_mu_is_refused_by_name() -> None:
    adapter = SchedulerAdapter("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True})
    with pytest.raises(ConfigError, match="use_dynamic_shifting=true"):
        adapter.start(3)


def test_evaluations_of_a_run_are_counted_by_its_solver() -> None:
    counts = {name: count_evaluations(name, None, 6) for name in SCHEDULERS}
    assert counts == {"unipc": 6, "euler": 6, "dpm++": 6, "heun": 11}
    assert count_evaluations(None, "FlowMatchHeunDiscreteScheduler", 6) == 11
    assert count_evaluations(None, "EDMEulerScheduler", 6) == count_evaluations(None, None, 6) == 6
