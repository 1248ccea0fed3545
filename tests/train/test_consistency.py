"""Consistency distillation against Gaussians, whose trajectories and denoisers are known in closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kinetoscope.core.errors import ConfigError
from kinetoscope.diffusion.convention import Convention
from kinetoscope.diffusion.noise import randn
from kinetoscope.train.methods.consistency import Consistency, ConsistencySettings
from kinetoscope.train.roles import ModelBase, Text, TrainBatch

MEAN, STD, OTHER, SHIFT = 0.5, 0.4, -0.3, 3.0


def spread(s: Tensor, std: float = STD) -> Tensor:
    """Standard deviation of N(., std^2) at noise level `s`."""
    return ((1 - s) ** 2 * std**2 + s**2).sqrt()


class Denoises(nn.Module):
    """The flow of N(MEAN, STD^2), of N(OTHER, STD^2) without a prompt."""

    def forward(self, x: Tensor, timestep: Tensor, *, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        s = (timestep / 1000).view(-1, 1, 1, 1, 1)
        prompted = encoder_hidden_states.amax((1, 2)).view_as(s)
        mean = prompted * MEAN + (1 - prompted) * OTHER
        x0 = mean + (1 - s) * STD**2 / spread(s) ** 2 * (x - (1 - s) * mean)
        return (x - x0) / s


class Jumps(nn.Module):
    """Where the trajectory of N(mean, STD^2) through x at s ends, as a flow: (x - end) / s."""

    def __init__(self, mean: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))

    def forward(self, x: Tensor, timestep: Tensor, **_: Any) -> Tensor:
        s = (timestep / 1000).view(-1, 1, 1, 1, 1)
        end = self.mean + STD / spread(s) * (x - (1 - s) * self.mean)
        return torch.where(s > 0, (x - end) / s.clamp_min(1e-6), 0.0)


class Toy(ModelBase):
    convention = Convention()


def make(student: nn.Module, **settings: Any) -> Consistency:
    teacher = Toy(Denoises(), shift=SHIFT)
    teacher.init_preprocessors(lambda prompts: Text(torch.zeros(len(prompts), 1, 1), torch.ones(len(prompts))))
    roles = {"student": Toy(student, trainable=True, shift=SHIFT), "teacher": teacher}
    return Consistency(roles, ConsistencySettings(name="consistency", **settings))


def batch_of(rows: int) -> TrainBatch:
    clean = MEAN + STD * randn((rows, 2, 2, 3, 3), torch.Generator().manual_seed(1))
    return TrainBatch(clean, Text(torch.ones(rows, 1, 1), torch.ones(rows)))


def loss(method: Consistency, rows: int = 64) -> Tensor:
    return method.losses("student", batch_of(rows), 0, torch.Generator().manual_seed(2))["total"]


@pytest.mark.parametrize("huber", [0.0, 0.3])
def test_the_gradient_in_closed_form(huber: float) -> None:
    """Of a student with one parameter, the mean, by the chain rule on paper."""
    student = Jumps(-0.2)
    method, batch = make(student, intervals=6, guidance=2.5, huber=huber), batch_of(5)
    method.losses("student", batch, 0, torch.Generator().manual_seed(2))["total"].backward()

    generator = torch.Generator().manual_seed(2)  # draws the interval of each sample, then noise
    index = torch.randint(6, (5,), generator=generator)
    noise = randn(batch.latents.shape, generator)
    even = 1 - torch.arange(7) / 6
    s, t = ((SHIFT * u / (1 + 2 * u)).view(-1, 1, 1, 1, 1) for u in (even[index], even[index + 1]))
    x = (1 - s) * batch.latents + s * noise
    mean = OTHER + 2.5 * (MEAN - OTHER)  # equal deviations: guidance shifts the mean alone
    velocity = (s * (x - (1 - s) * mean) - (1 - s) * STD**2 * (x - (1 - s) * mean)) / spread(s) ** 2 - mean
    y = x + (t - s) * velocity
    there = -0.2 + STD / spread(s) * (x - (1 - s) * -0.2)
    end = -0.2 + STD / spread(t) * (y - (1 - t) * -0.2)
    slope = 1 - STD / spread(s) * (1 - s)
    each = ((there - end) * slope).flatten(1).sum(1)
    weight = 2.0 if huber == 0 else 1 / ((there - end).square().flatten(1).sum(1) + huber**2).sqrt()
    expected = (weight * each).sum() / batch.latents.numel()
    assert student.mean.grad is not None
    torch.testing.assert_close(student.mean.grad, expected, rtol=1e-3, atol=1e-6)


def test_where_trajectories_end_is_consistent() -> None:
    """The closed form of the ODE's end leaves only the error of Euler's steps, which falls with their square; the ends
    of other trajectories are not consistent."""
    with torch.no_grad():
        few, many = (float(loss(make(Jumps(MEAN), intervals=n, guidance=1))) for n in (16, 64))
        other = float(loss(make(Jumps(OTHER), intervals=64, guidance=1)))
    assert many < few / 8
    assert many < other / 10


def test_training_finds_the_guided_trajectories() -> None:
    student = Jumps(-1.0)
    method = make(student, intervals=32, guidance=2)
    optimizer = torch.optim.Adam([student.mean], 0.05)
    for step in range(120):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        method.losses("student", batch_of(64), step, generator)["total"].backward()
        optimizer.step()
    assert abs(float(student.mean.detach()) - (OTHER + 2 * (MEAN - OTHER))) < 0.05


def test_other_conventions_are_refused() -> None:
    class Epsilon(Toy):
        convention = Convention(prediction="epsilon")

    roles = {"student": Epsilon(Jumps(0.0)), "teacher": Toy(Denoises())}
    with pytest.raises(ConfigError, match="flow models"):
        Consistency(roles, ConsistencySettings(name="consistency"))
