"""Few-step denoising: the schedule, the arithmetic and the strategy against closed forms and the published code."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kinetoscope.core.errors import InputError
from kinetoscope.core.types import ExecutionArgs, ForwardBatch, SamplingParams
from kinetoscope.diffusion.few_step import HIGH_NOISE, LOW_NOISE, FewStepSchedule
from kinetoscope.diffusion.noise import NoiseSource
from kinetoscope.engine.engine import DenoisingEngine
from kinetoscope.engine.strategies.dmd import DMDExpertStrategy, DMDStrategy
from kinetoscope.models.wan.config import WanConfig
from kinetoscope.models.wan.transformer import WanTransformer3DModel
from models.tiny_causal_wan import FAST, FIXTURES, SEEDS, SIZE, TINY, fixture_model, prompt_embeds

MEAN, STD = 0.7, 1.3  # of the data in closed forms
STEPS = [1000, 757, 522]


class Gaussian:
    """The exact velocity for data N(MEAN, STD^2), in place of a network: E[n - x0 | x] at x = (1 - s) x0 + s n."""

    def __init__(self, log: list[float] | None = None) -> None:
        self.log = log

    def __call__(self, latents: Tensor, timestep: Tensor, text: Tensor, **_: Any) -> Tensor:
        s = (timestep / 1000).view(-1, 1, 1, 1, 1)
        if self.log is not None:
            self.log.append(float(timestep[0]))
        spread = (1 - s) ** 2 * STD**2 + s**2
        return -MEAN + (s - (1 - s) * STD**2) / spread * (latents - (1 - s) * MEAN)

    def prepare_conditioning(self, *, encoder_hidden_states: Tensor, text_lengths: Tensor | None) -> dict[str, Any]:
        return {"text": encoder_hidden_states}

    def prepare_timesteps(self, timesteps: Tensor) -> dict[str, Any]:
        return {}

    def prepare_shared(self, latent_shape: Any) -> dict[str, Any]:
        return {}


def make_batch(latents: Tensor, noise: NoiseSource, **extra: Any) -> ForwardBatch:
    params = SamplingParams(
        num_inference_steps=len(extra.get("dmd_denoising_steps", STEPS)),
        guidance_scale=1.0,
        flow_shift=extra.pop("flow_shift", 8.0),
        extra={"dmd_denoising_steps": STEPS, **extra},
    )
    size = len(latents)
    batch = ForwardBatch(params, ["p"] * size, [""] * size, list(noise.seeds), latents=latents, noise=noise)
    batch.prompt_embeds = torch.zeros(size, 1, 1)
    return batch


def run(networks: list[Any], batch: ForwardBatch) -> Tensor:
    parts: Any = SimpleNamespace(transformer=networks[0], transformer_2=networks[-1], boundary=875.0)
    strategy = DMDStrategy if len(networks) == 1 else DMDExpertStrategy
    with torch.no_grad():
        result = DenoisingEngine(strategy(parts)).run(batch, ExecutionArgs()).latents
    assert result is not None
    return result


# -- the schedule -----------------------------------------------------------------------------------------------------


def test_noise_levels_are_the_tables() -> None:
    """Literally: the shifted level whose time is nearest."""
    schedule = FewStepSchedule.make(STEPS, 8.0)
    levels = [8 * s / (1 + 7 * s) for s in (k / 1000 for k in range(1, 1001))]
    for t, sigma in zip(STEPS, schedule.sigmas, strict=True):
        assert sigma == pytest.approx(min(levels, key=lambda s: abs(1000 * s - t)), abs=1e-6)
    assert schedule.times == (1000.0, 757.0, 522.0)
    assert schedule.sigmas[1] != 0.757, "the table has no such level"


def test_warped_steps_of_self_forcing() -> None:
    schedule = FewStepSchedule.make([1000, 750, 500, 250], 5.0, warp=True)
    expected = [5 * s / (1 + 4 * s) for s in (1.0, 0.75, 0.5, 0.25)]
    assert schedule.sigmas == pytest.approx(expected, abs=1e-6)
    assert schedule.times == pytest.approx([1000, 937.5, 833.3333, 625], abs=1e-3)


def test_two_experts_split_at_the_boundary() -> None:
    schedule = FewStepSchedule.make([1000, 850, 700, 550, 350, 275, 200, 125], 12.0, warp=True, boundary=875.0)
    high = [t for t in schedule.times if t >= 875]
    assert schedule.high == len(high) == 4
    assert [schedule.expert(i) for i in range(8)] == [HIGH_NOISE] * 4 + [LOW_NOISE] * 4
    assert schedule.boundary == pytest.approx(0.875, abs=1e-3)


@pytest.mark.parametrize("steps", [[], [500, 500], [250, 500], [1001], [0], [500.0], [1000, -1]])
def test_bad_steps(steps: list[Any]) -> None:
    with pytest.raises(InputError, match="few-step timesteps"):
        FewStepSchedule.make(steps, 8.0)


def test_experts_without_a_low_step() -> None:
    with pytest.raises(InputError, match="below the experts' boundary 875"):
        FewStepSchedule.make([1000, 900], 1.0, boundary=875.0)


# -- the arithmetic ---------------------------------------------------------------------------------------------------


def test_prediction_is_float64() -> None:
    """Float32 arithmetic would lose what the last step needs: x and s v nearly cancel."""
    schedule = FewStepSchedule.make([1000], 8.0)
    x = torch.tensor([16777216.0])
    assert schedule.predict(0, x, torch.tensor([16777215.0])).item() == 1.0
    v = torch.tensor([1 / 3])
    exact = x.double() - v.double()
    assert schedule.predict(0, x, v).double().sub(exact).abs() <= 1.0  # one rounding, at the end


def test_noise_is_not_drawn_where_none_is_added() -> None:
    schedule = FewStepSchedule.make([1000, 950, 900, 500], 1.0, boundary=875.0)
    x, v = torch.ones(1, 2), torch.zeros(1, 2)

    def never() -> Tensor:
        raise AssertionError("noise was drawn")

    for index in (2, 3):  # the high-noise expert's last step and the last of all
        schedule.step(index, x, v, never)
    for index in (0, 1):
        with pytest.raises(AssertionError, match="noise was drawn"):
            schedule.step(index, x, v, never)


def test_noising_from_the_boundary_has_the_variance_of_its_level() -> None:
    """x_b = (1 - b) x0 + b n, noised to s, is (1 - s) x0 + s n' in distribution."""
    schedule = FewStepSchedule.make([1000, 950, 500], 1.0, boundary=875.0)
    s, b = schedule.sigmas[1], schedule.boundary
    assert b is not None
    ones, zeros = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    of_sample = schedule.renoise(0, ones, lambda: zeros)
    of_noise = schedule.renoise(0, zeros, lambda: ones)
    torch.testing.assert_close(of_sample * (1 - b), (1 - s) * ones, rtol=0, atol=1e-7)
    torch.testing.assert_close((of_sample * b) ** 2 + of_noise**2, s**2 * ones, rtol=0, atol=1e-7)


# -- the strategy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [{}, {"warp_denoising_step": True, "dmd_denoising_steps": [1000, 750, 500, 250]}])
def test_strategy_is_the_closed_form(extra: dict[str, Any]) -> None:
    """For Gaussian data E[x0 | x] is linear; the run is that formula and fresh noise, written out."""
    shape = (2, 3, 4, 5)
    batch = make_batch(NoiseSource([3, 4]).draw(shape), NoiseSource([5, 6]), **extra)
    assert batch.latents is not None
    x, source = batch.latents.double(), NoiseSource([5, 6])
    times: list[float] = []
    got = run([Gaussian(times)], batch)
    steps = batch.params.extra["dmd_denoising_steps"]  # pyright: ignore[reportOptionalSubscript]
    schedule = FewStepSchedule.make(steps, 8.0, warp=extra.get("warp_denoising_step", False))
    for index, t in enumerate(schedule.times):
        u = t / 1000  # what the network is told
        spread = (1 - u) ** 2 * STD**2 + u**2
        clean = MEAN + (1 - u) * STD**2 / spread * (x - (1 - u) * MEAN)
        noise = u / spread * (x - (1 - u) * MEAN)
        x = x - schedule.sigmas[index] * (noise - clean)  # x0, up to the table's rounding of u
        if index + 1 < len(schedule):
            s = schedule.sigmas[index + 1]
            x = (1 - s) * x + s * source.draw(shape).double()
    torch.testing.assert_close(got.double(), x, rtol=0, atol=1e-5)
    assert times == list(schedule.times)


def test_one_step_from_pure_noise_is_the_mean() -> None:
    batch = make_batch(NoiseSource([1]).draw((1, 1, 8, 8)), NoiseSource([2]), dmd_denoising_steps=[1000])
    torch.testing.assert_close(run([Gaussian()], batch), torch.full((1, 1, 1, 8, 8), MEAN), rtol=0, atol=1e-5)


def test_two_experts_cross_the_boundary() -> None:
    """Literally: above the boundary x_b = x - (s - b) v and noise from b up to s; the crossing step noises nothing."""
    steps = [1000, 850, 700, 550, 350, 275, 200, 125]
    high: list[float] = []
    low: list[float] = []
    extra = {"dmd_denoising_steps": steps, "warp_denoising_step": True, "flow_shift": 12.0}
    batch = make_batch(NoiseSource([1]).draw((1, 2, 8, 8)), NoiseSource([2]), **extra)
    assert batch.latents is not None
    x, source = batch.latents.double(), NoiseSource([2])
    got = run([Gaussian(high), Gaussian(low)], batch)
    assert len(high) == 4 and len(low) == 4 and min(high) >= 875 > max(low)
    levels = [12 * u / (1 + 11 * u) for u in (t / 1000 for t in steps)]
    b = min((12 * k / (1000 + 11 * k) for k in range(1, 1001)), key=lambda s: abs(s - 0.875))
    for index, (s, after) in enumerate(zip(levels, [*levels[1:], 0.0], strict=True)):
        v = Gaussian()(x, torch.full((1,), 1000 * s, dtype=torch.float64), torch.empty(0))
        if s >= 0.875:
            x = x - (s - b) * v
            if after >= 0.875:
                alpha = (1 - after) / (1 - b)
                x = alpha * x + (after**2 - (alpha * b) ** 2) ** 0.5 * source.draw((1, 2, 8, 8)).double()
        else:
            x = x - s * v
            if index + 1 < len(steps):
                x = (1 - after) * x + after * source.draw((1, 2, 8, 8)).double()
    torch.testing.assert_close(got.double(), x, rtol=0, atol=1e-5)


def test_equals_the_published_few_step_run() -> None:
    """FastVideo's own stage around diffusers' transformer, recorded."""
    wan = WanTransformer3DModel(WanConfig.from_dict(TINY)).eval()
    wan.load_state_dict(fixture_model().state_dict())
    noise = NoiseSource(SEEDS)
    batch = make_batch(noise.draw((SIZE[0], FAST.frames, *SIZE[1:])), noise, **FAST.options)
    batch.prompt_embeds = prompt_embeds()
    expected = load_file(FIXTURES / "runs.safetensors")["fast"]
    torch.testing.assert_close(run([wan], batch), expected, rtol=0, atol=1e-4 * float(expected.std()))


def test_a_sample_is_the_same_alone() -> None:
    shape = (1, 2, 4, 4)
    both = run([Gaussian()], make_batch(NoiseSource([3, 4]).draw(shape), NoiseSource([3, 4])))
    alone = run([Gaussian()], make_batch(NoiseSource([4]).draw(shape), NoiseSource([4])))
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"guidance_scale": 5.0}, "guidance is distilled"),
        ({"num_inference_steps": 50}, "distilled for the 3 timesteps"),
        ({"flow_shift": None}, "flow_shift"),
        ({"extra": None}, "dmd_denoising_steps"),
    ],
)
def test_refusals(change: dict[str, Any], words: str) -> None:
    batch = make_batch(torch.zeros(1, 1, 1, 4, 4), NoiseSource([0]))
    batch.params = dataclasses.replace(batch.params, **change)
    with pytest.raises(InputError, match=words):
        run([Gaussian()], batch)
