"""EDM schedules against diffusers' schedulers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from kinetoscope.core.errors import ConfigError, InputError
from kinetoscope.diffusion.convention import Convention, Preconditioning
from kinetoscope.diffusion.denoiser import Denoiser
from kinetoscope.diffusion.edm import EDMAdapter
from kinetoscope.diffusion.noise import NoiseSource

PUBLISHED = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "rho": 7.0}


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("schedule", ["karras", "exponential"])
@pytest.mark.parametrize("steps", [2, 36])
def test_levels_and_steps(steps: int, schedule: str, final: str) -> None:
    config = {**PUBLISHED, "sigma_schedule": schedule, "final_sigmas_type": final}
    oracle = EDMEulerScheduler(**config)
    oracle.set_timesteps(steps)
    run = EDMAdapter(config).start(steps)
    torch.testing.assert_close(torch.tensor(run.sigmas), oracle.sigmas, rtol=1e-6, atol=0)
    assert len(run) == steps and run.times == run.sigmas[:-1]
    convention = Convention(prediction="edm", interpolant="additive", preconditioning=Preconditioning(0.5))
    torch.testing.assert_close(convention.timestep(run.timesteps), oracle.timesteps)
    noise = NoiseSource([0])
    ours = theirs = noise.draw((4, 2, 2, 2)) * run.sigmas[0]
    for index, t in enumerate(oracle.timesteps):
        output = noise.draw((4, 2, 2, 2))
        denoiser = Denoiser(lambda *args, **conditioning: output, convention)  # noqa: B023 - called at once
        ours = run.step(denoiser.predict_x0(ours, torch.tensor([run.sigmas[index]])), index, ours)
        oracle.scale_model_input(theirs, t)
        theirs = oracle.step(output, t, theirs, return_dict=False)[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_levels_of_predict_2() -> None:
    """diffusers makes them with a flow scheduler that is told EDM's range."""
    oracle = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    oracle.register_to_config(sigma_max=80.0, sigma_min=0.002)
    oracle.set_timesteps(sigmas=torch.linspace(0, 1, 35, dtype=torch.float64))
    run = EDMAdapter({"final_sigmas_type": "sigma_min"}).start(35)
    assert run.sigmas[:-1] == oracle.sigmas[:-1].tolist() and run.sigmas[-1] == run.sigmas[-2]


def test_private_runs() -> None:
    adapter = EDMAdapter(PUBLISHED)
    one, two = adapter.start(3), adapter.start(3)
    x, x0 = NoiseSource([1]).draw((1, 1, 1, 1)), torch.zeros(1, 1, 1, 1, 1)
    first = one.step(x0, 0, x)
    assert torch.equal(two.step(x0, 0, x), first)
    assert torch.equal(two.step(x0, 1, first), one.step(x0, 1, first))


@pytest.mark.parametrize(
    "change",
    [
        {"sigma_schedule": "cosine"},
        {"final_sigmas_type": "last"},
        {"sigma_min": 0.0},
        {"sigma_max": 0.001},
    ],
)
def test_bad_configuration(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        EDMAdapter({**PUBLISHED, **change})


def test_nothing_to_override() -> None:
    adapter = EDMAdapter(PUBLISHED)
    assert adapter.override() is adapter and adapter.override("euler", 1.0) is adapter and adapter.shift == 1.0
    with pytest.raises(InputError, match="unipc"):
        adapter.override("unipc")
    with pytest.raises(InputError, match=r"flow_shift=3\.0"):
        adapter.override(shift=3.0)
    with pytest.raises(ConfigError, match="sigmas"):
        adapter.start(3, sigmas=[1.0, 0.5, 0.1])
