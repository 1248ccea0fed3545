"""Schedules are diffusers' own, and private to a run."""

from __future__ import annotations

import diffusers
import pytest
import torch

from kinetoscope.core.errors import ConfigError
from kinetoscope.diffusion.noise import NoiseSource
from kinetoscope.diffusion.scheduler import SCHEDULERS, SchedulerAdapter

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
    config = {"shift": 3.0} if name == "euler" else FLOW
    oracle = getattr(diffusers, SCHEDULERS[name])(**config)
    oracle.set_timesteps(8)
    expected = x
    for t in oracle.timesteps:
        expected = oracle.step(network(expected, float(t)), t, expected, return_dict=False)[0]
    assert torch.equal(follow(name, x), expected)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_interleaved_runs_do_not_touch_each_other(name: str) -> None:
    starts = [NoiseSource([s]).draw((4, 2, 3, 3)) for s in (1, 2)]
    alone = [follow(name, x) for x in starts]
    maker = prototype(name)
    runs = [maker.start(8), maker.start(8)]
    for i in range(8):
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
    with pytest.raises(ConfigError, match="unipc, euler"):
        prototype("ddim")
    with pytest.raises(ConfigError, match="FlowMatchEuler"):
        SchedulerAdapter("DDIMScheduler")
