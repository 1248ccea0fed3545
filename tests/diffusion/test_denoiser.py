"""One object for training and sampling: every convention read both ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kinetoscope.core.errors import ConfigError
from kinetoscope.diffusion.convention import Convention, Preconditioning, shift_sigma
from kinetoscope.diffusion.denoiser import Denoiser
from kinetoscope.diffusion.noise import NoiseSource

X0, NOISE = NoiseSource([1, 2]).draw((4, 3, 2, 2)), NoiseSource([3, 4]).draw((4, 3, 2, 2))
CONVENTIONS = [
    Convention(prediction=p, interpolant=i, sign=s)
    for p in ("flow", "epsilon", "v", "x0")
    for i in ("linear", "cosine")
    for s in (1, -1)
]
EDM = [
    Convention(prediction="edm", interpolant="additive", preconditioning=p)
    for p in (Preconditioning(0.5), Preconditioning(1.0, flow=True))
]


class Knowing:
    """A network that knows the answer, and notes the timesteps it was called with."""

    def __init__(self, answer: torch.Tensor) -> None:
        self.answer = answer
        self.seen: list[torch.Tensor] = []

    def __call__(self, latents: torch.Tensor, timestep: torch.Tensor, **conditioning: Any) -> torch.Tensor:
        self.seen.append(timestep)
        return self.answer


@pytest.mark.parametrize("s", [torch.tensor([0.3, 0.8]), torch.tensor([[0.1, 0.5, 0.9], [0.4, 0.4, 0.2]])])
@pytest.mark.parametrize("convention", CONVENTIONS + EDM)
def test_the_target_leads_back_to_clean_and_noise(convention: Convention, s: torch.Tensor) -> None:
    plain = Denoiser(Knowing(X0), convention)
    network = Knowing(plain.target(X0, NOISE, s) * convention.sign)
    denoiser = Denoiser(network, convention)
    x = denoiser.add_noise(X0, NOISE, s)
    torch.testing.assert_close(denoiser.predict_x0(x, s), X0, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(denoiser.predict_noise(x, s), NOISE, atol=1e-5, rtol=1e-5)
    assert torch.all(denoiser.loss(X0, NOISE, s) < 1e-10)
    assert torch.equal(network.seen[0], convention.timestep(s))
    if convention.preconditioning is None:
        assert torch.equal(network.seen[0], s * 1000)


def test_flow_matching_in_numbers() -> None:
    s = torch.tensor([0.25, 0.75])
    denoiser = Denoiser(Knowing(torch.zeros_like(X0)), Convention())
    levels = s.view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(denoiser.add_noise(X0, NOISE, s), (1 - levels) * X0 + levels * NOISE)
    error = (NOISE - X0).square()
    torch.testing.assert_close(denoiser.loss(X0, NOISE, s), error.flatten(1).mean(1))
    weight = torch.arange(X0.shape[1]).view(-1, *[1] * (X0.ndim - 2))  # of channels
    expected = sum(k * error[:, k].flatten(1).sum(1) for k in range(X0.shape[1])) / X0[0].numel()
    torch.testing.assert_close(denoiser.loss(X0, NOISE, s, weight=weight), expected)


def test_shift() -> None:
    s = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(shift_sigma(s, 3.0), torch.tensor([0.0, 0.75, 1.0]))
    torch.testing.assert_close(shift_sigma(s, 1.0), s)


class Reading:
    """A network that returns zeros and notes its input."""

    def __call__(self, latents: torch.Tensor, timestep: torch.Tensor, **conditioning: Any) -> torch.Tensor:
        self.seen = latents
        return torch.zeros_like(latents)


@pytest.mark.parametrize("convention", EDM)
@pytest.mark.parametrize("level", [0.002, 0.5, 7.0, 80.0])
def test_preconditioned_input_and_target_have_unit_variance(convention: Convention, level: float) -> None:
    """The purpose of the scalings (arXiv 2206.00364, appendix B.6); the flow form has a flow's variances instead."""
    edm = convention.preconditioning
    assert edm is not None
    many = NoiseSource([5]).draw((40_000,)), NoiseSource([6]).draw((40_000,))
    x0, noise, s = edm.sigma_data * many[0], many[1], torch.tensor([level])
    network = Reading()
    denoiser = Denoiser(network, convention)
    denoiser.predict(denoiser.add_noise(x0, noise, s), s)
    target = denoiser.target(x0, noise, s)
    if edm.flow:
        t = level / (1 + level)
        torch.testing.assert_close(network.seen, (1 - t) * x0 + t * noise, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(target, noise - x0, rtol=1e-2, atol=1e-2)  # c_out is near 0 at small levels
    else:
        assert abs(network.seen.std() - 1) < 0.02 and abs(target.std() - 1) < 0.02


def test_edm_comes_whole() -> None:
    with pytest.raises(ConfigError, match="together"):
        Convention(prediction="edm")
    with pytest.raises(ConfigError, match="together"):
        Convention(preconditioning=Preconditioning())
