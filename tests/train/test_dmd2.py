"""DMD2: its gradient against the scores of Gaussians, its rollouts against sampling, and the loop that shows it."""

from __future__ import annotations

import itertools
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from kinetoscope.core.errors import ConfigError
from kinetoscope.core.types import ForwardBatch
from kinetoscope.diffusion.convention import Convention
from kinetoscope.diffusion.noise import NoiseSource, randn
from kinetoscope.train.data.ode_pairs import OdePairsData
from kinetoscope.train.methods.dmd2 import DMD2, DMD2Settings, dmd_gradient
from kinetoscope.train.plugins import Opened
from kinetoscope.train.post import load_post_recipe
from kinetoscope.train.roles import ModelBase, Text, TrainBatch
from tiny import make_tiny_wan

RECIPES = Path(__file__).parents[2] / "recipes"
LOOP, RECIPE = RECIPES / "dmd2_loop.py", RECIPES / "tiny_t2v_4step.yaml"
SHAPE = (2, 1, 2, 2)  # of the toys' latents


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Gaussian(nn.Module):
    """The exact flow of videos that are drawn from N(mean, std^2); of those without a prompt, from N(other, std^2)."""

    def __init__(self, mean: float | Tensor, std: float, other: float = 0.0) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.as_tensor(mean, dtype=torch.float32).expand(SHAPE).clone())
        self.std, self.other = std, other

    def forward(self, x: Tensor, timestep: Tensor, *, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        s = (timestep / 1000).view(-1, 1, 1, 1, 1)
        prompted = encoder_hidden_states.amax((1, 2)).view_as(s)
        mean = prompted * self.mean + (1 - prompted) * self.other
        gain = (1 - s) * self.std**2 / ((1 - s) ** 2 * self.std**2 + s**2)
        x0 = mean + gain * (x - (1 - s) * mean)
        return (x - x0) / s

    def score(self, x: Tensor, s: Tensor) -> Tensor:
        """Of the prompted videos at noise level `s`."""
        s = s.view(-1, 1, 1, 1, 1)
        return -(x - (1 - s) * self.mean) / ((1 - s) ** 2 * self.std**2 + s**2)


class Toy(ModelBase):
    convention = Convention()


def toys(**means: Gaussian) -> dict[str, ModelBase]:
    roles: dict[str, ModelBase] = {n: Toy(g, trainable=n != "teacher") for n, g in means.items()}
    for role in roles.values():
        role.init_preprocessors(lambda prompts: Text(torch.zeros(len(prompts), 1, 1), torch.ones(len(prompts))))
    return roles


def toy_batch(rows: int) -> TrainBatch:
    return TrainBatch(torch.zeros(rows, *SHAPE), Text(torch.ones(rows, 1, 1), torch.ones(rows)))


class Told(DMD2):
    """Draws what it is told to."""

    noises: list[Tensor]
    told: Tensor

    def draw(self, batch: TrainBatch, generator: torch.Generator) -> Tensor:
        return self.noises.pop(0)

    def levels(self, rows: int, generator: torch.Generator) -> Tensor:
        return self.told


def test_the_gradient_is_the_difference_of_scores() -> None:
    """A student of one step is a point, its mean, and the derivative of its videos by it is the identity."""
    at = randn(SHAPE, generator(1))
    student, teacher, critic = Gaussian(at, 0.5), Gaussian(0.7, 0.4), Gaussian(-0.2, 0.9)
    method = Told(
        toys(student=student, teacher=teacher, critic=critic), DMD2Settings(name="dmd2", steps=(1000,), guidance=1)
    )
    noise, method.told = randn((3, *SHAPE), generator(2)), torch.tensor([0.1, 0.5, 0.9])
    method.noises = [randn((3, *SHAPE), generator(3)), noise]
    terms = method.losses("student", toy_batch(3), 0, generator())
    terms["total"].backward()

    s = method.told.view(-1, 1, 1, 1, 1)
    x = (1 - s) * at + s * noise
    with torch.no_grad():
        difference = s**2 / (1 - s) * (critic.score(x, method.told) - teacher.score(x, method.told))
        real = (x + s**2 * teacher.score(x, method.told)) / (1 - s)  # Tweedie
    each = difference / (at - real).abs().mean((1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(student.mean.grad, each.sum(0) / each.numel(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(terms["gradient"], each.abs().mean(), rtol=1e-4, atol=1e-6)
    assert teacher.mean.grad is None and critic.mean.grad is None


def test_the_critic_learns_the_flow_of_what_the_student_makes() -> None:
    """The gradient of a critic with one mean, by the chain rule on paper."""
    at = randn(SHAPE, generator(1))
    student, critic = Gaussian(at, 0.5), Gaussian(-0.2, 0.9)
    roles = toys(student=student, teacher=Gaussian(0.7, 0.4), critic=critic)
    method = Told(roles, DMD2Settings(name="dmd2", steps=(1000,)))
    noise, method.told = randn((3, *SHAPE), generator(2)), torch.tensor([0.1, 0.5, 0.9])
    method.noises = [randn((3, *SHAPE), generator(3)), noise]
    method.losses("critic", toy_batch(3), 0, generator())["total"].backward()

    s = method.told.view(-1, 1, 1, 1, 1)
    x = (1 - s) * at + s * noise
    gain = (1 - s) * 0.9**2 / ((1 - s) ** 2 * 0.9**2 + s**2)
    x0 = -0.2 + gain * (x + 0.2 * (1 - s))
    slope = -(1 - gain * (1 - s)) / s  # of (x - x0) / s by the mean
    expected = (2 * ((x - x0) / s - (noise - at)) * slope).sum(0) / x.numel()
    torch.testing.assert_close(critic.mean.grad, expected, rtol=1e-4, atol=1e-5)
    assert student.mean.grad is None


def test_student_and_critic_find_the_guided_teacher() -> None:
    """Alternating updates end where the student's videos have the guided teacher's mean, u + w (c - u)."""
    student, critic = Gaussian(-1.0, 0.5), Gaussian(-1.0, 0.05)
    roles = toys(student=student, teacher=Gaussian(0.6, 0.3, other=0.2), critic=critic)
    method = DMD2(roles, DMD2Settings(name="dmd2", steps=(1000,), guidance=3, student_every=2))
    optimizers = {"student": torch.optim.Adam([student.mean], 0.05), "critic": torch.optim.Adam([critic.mean], 0.1)}
    for step in range(160):
        for role in method.updates(step):
            optimizers[role].zero_grad()
            method.losses(role, toy_batch(32), step, generator(7 * step + len(role)))["total"].backward()
            optimizers[role].step()
    torch.testing.assert_close(student.mean.mean(), torch.tensor(0.2 + 3 * 0.4), rtol=0, atol=0.05)
    torch.testing.assert_close(critic.mean.mean(), student.mean.mean(), rtol=0, atol=0.1)


def test_nothing_that_is_not_finite_reaches_the_student() -> None:
    x0 = torch.ones(2, 1, 1, 1, 2)
    real = torch.stack([x0[0], x0[1] + 1])
    assert torch.isfinite(dmd_gradient(x0, x0, real)).all()
    gradient = dmd_gradient(x0, x0 + 3, real)  # the first sample is the teacher's own, the second one off
    assert torch.equal(gradient, torch.stack([0 * x0[0], 2 * x0[1]]))


def test_updates_take_turns() -> None:
    roles = toys(student=Gaussian(0, 1), teacher=Gaussian(0, 1), critic=Gaussian(0, 1))
    method = DMD2(roles, DMD2Settings(name="dmd2", student_every=3, student_start=2))
    assert [len(method.updates(step)) for step in range(9)] == [1, 1, 2, 1, 1, 2, 1, 1, 2]
    assert method.updates(2) == ("critic", "student")


def test_the_recipe_samples_as_it_trains() -> None:
    recipe = load_post_recipe(RECIPE)
    method, defaults = recipe.method, recipe.export.defaults
    assert isinstance(method, DMD2Settings) and set(recipe.models) == set(DMD2.needs)
    assert defaults["extra"] == {"dmd_denoising_steps": list(method.steps), "warp_denoising_step": method.warp}
    assert defaults["flow_shift"] == recipe.models["student"].shift
    assert defaults["num_inference_steps"] == len(method.steps) and defaults["guidance_scale"] == 1
    assert recipe.optimizer_of("critic").learning_rate > recipe.optimizer_of("student").learning_rate


def test_the_recipe_goes_on_from_its_first_part() -> None:
    first, second = load_post_recipe(RECIPES / "tiny_t2v_4step_start.yaml"), load_post_recipe(RECIPE)
    pairs, matching = first.data, second.method
    assert isinstance(pairs, OdePairsData) and isinstance(matching, DMD2Settings)
    assert pairs.steps == matching.steps and pairs.warp == matching.warp
    assert pairs.shift == second.models["student"].shift
    assert second.models["student"].init_from == f"{first.output}/model"
    assert pairs.teacher == second.models["teacher"].init_from and first.export == second.export
    causal = load_post_recipe(RECIPES / "tiny_causal_ode.yaml").data
    assert isinstance(causal, OdePairsData) and causal.model_dump() == pairs.model_dump(), "they share trajectories"


def test_settings_and_roles_that_cannot_work() -> None:
    with pytest.raises(ValidationError, match="levels must rise"):
        DMD2Settings(name="dmd2", levels=(0.5, 0.2))

    class Epsilon(Toy):
        convention = Convention(prediction="epsilon")

    roles = toys(teacher=Gaussian(0, 1), critic=Gaussian(0, 1)) | {"student": Epsilon(Gaussian(0, 1))}
    with pytest.raises(ConfigError, match="flow models"):
        DMD2(roles, DMD2Settings(name="dmd2"))


# -- against sampling -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student's directory: samples four steps, warped."""
    path = make_tiny_wan(tmp_path_factory.mktemp("dmd2") / "tiny")
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps(index | {"_class_name": "WanDMDPipeline"}))
    defaults = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 4, "flow_shift": 3.0}
    extra = {"dmd_denoising_steps": [1000, 750, 500, 250], "warp_denoising_step": True}
    sidecar = {"world": "shapes", "defaults": defaults | {"guidance_scale": 1.0, "extra": extra}}
    (path / "kinetoscope.json").write_text(json.dumps(sidecar))
    return path


class Replayed(DMD2):
    """Draws a run's noise and leaves at a given step."""

    source: NoiseSource
    leave: int

    def draw(self, batch: TrainBatch, generator: torch.Generator) -> Tensor:
        return self.source.draw(batch.latents.shape[1:])

    def exit_step(self, generator: torch.Generator) -> int:
        return self.leave


def opened_method(path: Path, **settings: Any) -> tuple[Opened, Replayed, TrainBatch]:
    opened = Opened(str(path))
    role = opened.role(trainable=True, shift=3.0)
    method = Replayed(dict.fromkeys(DMD2.needs, role), DMD2Settings(name="dmd2", **settings))
    text = opened.encoder()(["a red circle", "a blue square moving left"])
    return opened, method, role.prepare_batch(text, shape=(16, 2, 4, 4))


def test_a_rollout_is_what_sampling_does(tiny: Path) -> None:
    opened, method, batch = opened_method(tiny)
    params = opened.pipeline.defaults()
    run = ForwardBatch(params, ["a red circle", "a blue square moving left"], ["", ""], [5, 6])
    sampled = opened.pipeline.run(run).latents
    assert sampled is not None
    ends: list[Tensor] = []
    for method.leave in range(4):
        method.source = NoiseSource([5, 6])
        ends.append(method.rollout(batch, generator(), generator()).detach())
    torch.testing.assert_close(ends[3], sampled, rtol=0, atol=1e-5)
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.pairwise(ends)), "each step must matter"


def test_gradients_go_through_the_exit_step_alone(tiny: Path) -> None:
    """As of one forward from where the steps before it had led."""
    _, method, batch = opened_method(tiny)
    method.leave, method.source = 2, NoiseSource([5, 6])
    method.rollout(batch, generator(), generator()).square().sum().backward()
    parameters = dict(method.student.transformer.named_parameters())
    name = "blocks.0.attn1.to_q.weight"
    got = parameters[name].grad
    method.student.transformer.zero_grad()
    method.source = NoiseSource([5, 6])
    noise = lambda: method.draw(batch, generator())  # noqa: E731
    with torch.no_grad():
        x = noise()
        for index in range(2):
            v = method.student.predict(x, torch.full((2,), method.schedule.sigmas[index]), batch)
            x = method.schedule.step(index, x, v, noise)
    s = torch.full((2,), method.schedule.sigmas[2])
    method.student.predict_x0(x, s, batch).square().sum().backward()
    expected = parameters[name].grad
    assert got is not None and expected is not None and expected.abs().max() > 0
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_data_latents_are_noised_to_the_exit_step(tiny: Path) -> None:
    _, method, batch = opened_method(tiny, rollout="data_latent")
    batch = TrainBatch(randn(batch.latents.shape, generator(4)), batch.text)
    method.leave, method.source = 3, NoiseSource([5, 6])
    s = torch.full((2,), method.schedule.sigmas[3])
    with torch.no_grad():
        found = method.rollout(batch, generator(), generator())
        noise = NoiseSource([5, 6]).draw(batch.latents.shape[1:])
        expected = method.student.predict_x0(method.student.add_noise(batch.latents, noise, s), s, batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_critic_learns_from_videos_as_constants(tiny: Path) -> None:
    opened, method, batch = opened_method(tiny)
    student = opened.role(trainable=True, shift=3.0)
    critic = Opened(str(tiny)).role(trainable=True, shift=3.0)
    method = DMD2({"student": student, "teacher": student, "critic": critic}, method.settings)
    method.losses("critic", batch, 0, generator())["total"].backward()
    assert all(p.grad is None for p in student.transformer.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in critic.transformer.parameters())


def test_the_flat_loop_makes_a_model_that_samples(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "student"
    options = ["--steps", "2", "--student-every", "1", "--batch", "2", "--lr", "1e-3", "--ema", "0"]
    monkeypatch.setattr(sys, "argv", ["dmd2_loop.py", str(tiny), str(out), *options])
    runpy.run_path(str(LOOP))
    assert "step 1 " in capsys.readouterr().out
    before, after = Opened(str(tiny)), Opened(str(out))
    assert type(after.pipeline) is type(before.pipeline)
    moved = [
        (a - b).detach().abs().max()
        for a, b in zip(*(o.transformer.parameters() for o in (before, after)), strict=True)
    ]
    assert 5e-4 < max(float(m) for m in moved) < 4e-3  # two updates of Adam at the rate
    frames = after.sample(["a red circle"], [0]).frames
    assert frames is not None
