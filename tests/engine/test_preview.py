"""The preview hook: what it shows is what the step predicts, whatever steps the run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kinetoscope.core.errors import ConfigError
from kinetoscope.core.types import ExecutionArgs, ForwardBatch, SamplingParams
from kinetoscope.diffusion.convention import Convention
from kinetoscope.diffusion.denoiser import Denoiser
from kinetoscope.diffusion.edm import EDMAdapter
from kinetoscope.diffusion.few_step import FewStepRun, FewStepSchedule
from kinetoscope.diffusion.guidance import Guidance
from kinetoscope.diffusion.noise import NoiseSource, generator_for, randn
from kinetoscope.diffusion.scheduler import SCHEDULERS, SchedulerAdapter
from kinetoscope.engine.hooks.preview import Preview, PreviewHook, PreviewMap, clean_estimate
from kinetoscope.engine.protocols import Step, StrategyState

SHAPE = (4, 2, 3, 5)


def noise(seed: int, batch: int = 2) -> Tensor:
    return randn((batch, *SHAPE), generator_for(seed))


def some_map(channels: int = 4) -> PreviewMap:
    return PreviewMap(0.2 * randn((3, channels), generator_for(1)), torch.tensor([0.1, -0.2, 0.3]))


def state_of(run: Any, latents: Tensor) -> StrategyState:
    batch = ForwardBatch(SamplingParams(), ["a"] * 2, [""] * 2, [1, 2])
    return StrategyState(batch, ExecutionArgs(), latents, Guidance(1.0), NoiseSource([1, 2]), (), run)


def runs() -> dict[str, Any]:
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    found: dict[str, Any] = {
        name: SchedulerAdapter(cls, {"shift": 3.0} if name in ("euler", "heun") else flow).start(5)
        for name, cls in SCHEDULERS.items()
    }
    found["few"] = FewStepRun(FewStepSchedule.make([1000, 750, 500, 250], 5.0), NoiseSource([1, 2]))
    found["edm"] = EDMAdapter({}).start(5)
    return found


@pytest.mark.parametrize("name", [*SCHEDULERS, "few", "edm"])
def test_the_estimate_is_the_clean_sample(name: str) -> None:
    """With a right prediction every step of every solver shows the clean sample; after the last it is there."""
    run, clean, start = runs()[name], noise(3), noise(4)
    x = start * (run.sigmas[0] if name == "edm" else 1)
    for index in range(len(run)):
        prediction = clean if name == "edm" else (x - clean) / run.sigmas[index]  # x = (1 - s) x0 + s n, v = n - x0
        state = state_of(run, x)
        step = Step(index, len(run), run.times[index], guided=prediction)
        state.latents = run.step(prediction, index, x)
        found = clean_estimate(state, step, x)
        assert found is not None
        if index in run.starts:  # at a straight path Heun's second evaluation corrects nothing
            torch.testing.assert_close(found, clean, rtol=0, atol=1e-4)
        x = state.latents
    torch.testing.assert_close(x, clean, rtol=0, atol=1e-4)


def test_the_estimate_is_the_denoisers() -> None:
    run = runs()["unipc"]
    x, v = noise(5), noise(6)
    state = state_of(run, run.step(v, 0, x))
    expected = Denoiser(lambda *a, **k: v, Convention("flow")).to_x0(v, x, torch.full((2,), run.sigmas[0]))
    found = clean_estimate(state, Step(0, 5, run.times[0], guided=v), x)
    assert found is not None
    torch.testing.assert_close(found, expected)


def test_given_frames_stay_as_they_are() -> None:
    run = runs()["euler"]
    x, v = noise(7), noise(8)
    after = run.step(v, 0, x)
    after[:, :, 0] = x[:, :, 0]
    found = clean_estimate(state_of(run, after), Step(0, 5, run.times[0], guided=v), x)
    assert found is not None
    assert torch.equal(found[:, :, 0], x[:, :, 0])
    torch.testing.assert_close(found[:, :, 1], (x - run.sigmas[0] * v)[:, :, 1])


def test_without_a_schedule_the_sample_is_shown() -> None:
    seen: list[Preview] = []
    hook = PreviewHook(some_map(), lambda preview, batch: seen.append(preview))
    state = state_of(None, noise(9))
    hook.on_run_start(state)
    hook.on_step_start(state, Step(0, 1, 1.0))
    hook.on_step_end(state, Step(0, 1, 1.0, guided=noise(10)))
    assert not seen[0].clean and np.array_equal(seen[0].frames, some_map().frames(state.latents))


def test_colours_are_the_map() -> None:
    latents, preview_map = noise(11), some_map()
    frames = preview_map.frames(latents)
    assert frames.shape == (2, 2, 3, 5, 3) and frames.dtype == np.uint8
    pixel = preview_map.weight @ latents[1, :, 0, 2, 4] + preview_map.bias
    expected = (pixel.clamp(-1, 1) * 127.5 + 127.5).round()
    assert frames[1, 0, 2, 4].tolist() == expected.tolist()
    assert frames.min() < 60 and frames.max() > 195  # neither washed out nor clipped to nothing


@pytest.mark.parametrize(("every", "shown"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3, 4]), (9, [0, 4])])
def test_every_few_steps_and_the_last(every: int, shown: list[int]) -> None:
    seen: list[Preview] = []
    hook = PreviewHook(some_map(), lambda preview, batch: seen.append(preview), every)
    state = state_of(runs()["euler"], noise(12))
    for index in range(5):
        step = Step(index, 5, 1.0, guided=noise(13))
        hook.on_step_start(state, step)
        state.latents = noise(14 + index)
        hook.on_step_end(state, step)
    assert [p.step for p in seen] == shown and all(p.clean for p in seen)


def test_a_map_of_another_vae_and_a_bad_interval_are_refused() -> None:
    with pytest.raises(ConfigError, match="16 latent channels, this model has 4"):
        PreviewHook(some_map(16), print).on_run_start(state_of(None, noise(1)))
    with pytest.raises(ConfigError, match="every 0 steps"):
        PreviewHook(some_map(), print, 0)
