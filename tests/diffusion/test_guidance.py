"""Guidance against its formula and against diffusers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance, ClassifierFreeZeroStarGuidance
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from kinetoscope.core.errors import InputError
from kinetoscope.diffusion.guidance import Guidance, GuidanceMemory, cfg_zero_scale
from kinetoscope.diffusion.noise import NoiseSource

COND, UNCOND = NoiseSource([1, 2]).draw((4, 3, 5, 5)), NoiseSource([3, 4]).draw((4, 3, 5, 5))


def test_formula() -> None:
    guided = Guidance(5.0).combine({"cond": COND, "uncond": UNCOND})
    assert torch.equal(guided, UNCOND + 5.0 * (COND - UNCOND))


def test_scale_one_needs_no_unconditional_row() -> None:
    assert Guidance(1.0).branches == ("cond",)
    assert torch.equal(Guidance(1.0).combine({"cond": COND}), COND)
    assert Guidance(1.5).branches == ("uncond", "cond")


def test_rescale_is_that_of_diffusers() -> None:
    guided = Guidance(5.0).combine({"cond": COND, "uncond": UNCOND})
    ours = Guidance(5.0, rescale=0.7).combine({"cond": COND, "uncond": UNCOND})
    torch.testing.assert_close(ours, rescale_noise_cfg(guided, COND, guidance_rescale=0.7))


def test_bfloat16_predictions_are_combined_in_float32() -> None:
    cond, uncond = COND.bfloat16(), UNCOND.bfloat16()
    guided = Guidance(5.0).combine({"cond": cond, "uncond": uncond})
    assert guided.dtype == torch.float32
    assert torch.equal(guided, uncond.float() + 5.0 * (cond.float() - uncond.float()))


@pytest.mark.parametrize("values", [{"scale": 0.5}, {"scale": float("nan")}, {"rescale": 1.5}, {"rescale": -0.1}])
def test_out_of_range(values: dict[str, float]) -> None:
    with pytest.raises(InputError):
        Guidance(**values)


def test_cfg_zero_scale_is_the_projection() -> None:
    """What is left of cond after the scaled uncond is taken away is orthogonal to it, in every sample by itself."""
    scale = cfg_zero_scale(COND, UNCOND)
    assert scale.shape == (len(COND), *[1] * (COND.ndim - 1))
    rest = (COND - scale * UNCOND) * UNCOND
    assert rest.flatten(1).sum(1).abs().max() < 1e-3
    torch.testing.assert_close(cfg_zero_scale(2.5 * UNCOND, UNCOND), torch.full_like(scale, 2.5))
    assert cfg_zero_scale(COND, torch.zeros_like(UNCOND)).abs().max() == 0


STEPS = 10
VIDEOS = [(NoiseSource([10 + i, 20 + i]).draw((4, 3, 5, 5)), NoiseSource([30 + i, 40 + i]).draw((4, 3, 5, 5)))
          for i in range(STEPS)]  # fmt: skip


def ours(guidance: Guidance) -> list[torch.Tensor]:
    """The guided predictions of a run, from those branches alone that each step says it needs."""
    memory, results = GuidanceMemory(), []
    for i, (cond, uncond) in enumerate(VIDEOS):
        found = {"cond": cond, "uncond": uncond}
        needed = guidance.needed(i, STEPS, memory)
        results.append(guidance.combine({b: found[b] for b in needed}, i, STEPS, memory))
    return results


def theirs(guider: Any) -> list[torch.Tensor]:
    """The same by a guider of diffusers."""
    results = []
    for i, (cond, uncond) in enumerate(VIDEOS):
        guider.set_state(step=i, num_inference_steps=STEPS, timestep=torch.tensor(1000.0 - i))
        if i == 0:  # where the guider makes its momentum buffer
            guider.prepare_inputs({"x": (cond, uncond)})
        both = guider.num_conditions == 2
        results.append(guider.forward(cond, uncond if both else None).pred)
    return results


@pytest.mark.parametrize(
    ("spec", "rescale", "guider"),
    [
        (None, 0.0, ClassifierFreeGuidance(guidance_scale=5.0)),
        ("cfg:start=0.2,stop=0.75", 0.3, ClassifierFreeGuidance(5.0, 0.3, start=0.2, stop=0.75)),
        ("cfg-zero:init=2", 0.0, ClassifierFreeZeroStarGuidance(5.0, zero_init_steps=2)),
        ("cfg-zero:stop=0.5", 0.0, ClassifierFreeZeroStarGuidance(5.0, zero_init_steps=1, stop=0.5)),
        ("apg", 0.0, AdaptiveProjectedGuidance(5.0)),
        ("apg:eta=0,norm=3", 0.0, AdaptiveProjectedGuidance(5.0, None, 3.0, eta=0.0)),
        (
            "apg:eta=0.25,norm=2,momentum=-0.5,dims=chw,start=0.1",
            0.7,
            AdaptiveProjectedGuidance(5.0, -0.5, 2.0, (1, 3, 4), 0.25, 0.7, start=0.1),
        ),
    ],
)
def test_kinds_are_those_of_diffusers(spec: str | None, rescale: float, guider: Any) -> None:
    for mine, other in zip(ours(Guidance.make(5.0, rescale, spec)), theirs(guider), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_the_fraction_gate_reuses_the_last_difference() -> None:
    guidance, memory = Guidance.make(4.0, 0.0, "cfg:reuse=0.3"), GuidanceMemory()
    assert [guidance.needed(i, STEPS, memory) for i in range(2)] == [("uncond", "cond")] * 2
    results = ours(guidance)
    last = VIDEOS[2][0] - VIDEOS[2][1]  # steps 0, 1, 2 are full
    for i in range(3):
        torch.testing.assert_close(results[i], VIDEOS[i][1] + 4.0 * (VIDEOS[i][0] - VIDEOS[i][1]))
    for i in range(3, STEPS):
        torch.testing.assert_close(results[i], VIDEOS[i][0] + 3.0 * last)


def test_another_guidance_drops_what_is_remembered() -> None:
    """Two experts: the difference of one means nothing to the other."""
    first, second, memory = Guidance(4.0, reuse=0.5), Guidance(3.0, reuse=0.5), GuidanceMemory()
    both = {"cond": COND, "uncond": UNCOND}
    first.combine(both, 0, 4, memory)
    assert first.needed(2, 4, memory) == ("cond",)
    assert second.needed(2, 4, memory) == ("uncond", "cond")
    torch.testing.assert_close(second.combine(both, 2, 4, memory), UNCOND + 3.0 * (COND - UNCOND))
    torch.testing.assert_close(second.combine({"cond": COND}, 3, 4, memory), COND + 2.0 * (COND - UNCOND))


@pytest.mark.parametrize("spec", ["cfg:cosine=0.9", "cfg:cosine=0.9,reuse=1", "apg:cosine=0.9,momentum=0.5,norm=3"])
@pytest.mark.parametrize("rescale", [0.0, 0.5])
def test_cosine_gate_of_a_sample_ignores_its_neighbours(spec: str, rescale: float) -> None:
    """Sample 0 agrees at the second step, sample 1 never; each is what it is alone."""
    guidance, draw = Guidance.make(4.0, rescale, spec), torch.Generator().manual_seed(0)
    uncond = torch.randn(5, 2, 3, 1, 4, 4, generator=draw)
    cond = torch.randn(5, 2, 3, 1, 4, 4, generator=draw)
    cond[1, 0] = uncond[1, 0] * 1.1

    def run(samples: slice) -> tuple[list[torch.Tensor], list[tuple[str, ...]]]:
        memory, results, branches = GuidanceMemory(), [], []
        for step in range(5):
            needed = guidance.needed(step, 5, memory)
            given = {"uncond": uncond[step, samples], "cond": cond[step, samples]}
            results.append(guidance.combine({b: given[b] for b in needed}, step, 5, memory))
            branches.append(needed)
        return results, branches

    together, _ = run(slice(0, 2))
    for sample in range(2):
        alone, branches = run(slice(sample, sample + 1))
        assert branches[2] == (("cond",) if sample == 0 else ("uncond", "cond"))
        for step in range(5):
            assert torch.equal(together[step][sample], alone[step][0]), (sample, step)


def test_the_cosine_gate_leaves_the_unconditional_branch_out_for_good() -> None:
    guidance, memory = Guidance(4.0, cosine=0.9), GuidanceMemory()
    guidance.combine({"cond": COND, "uncond": UNCOND}, 0, 4, memory)
    assert guidance.needed(1, 4, memory) == ("uncond", "cond")
    near = torch.stack([COND[0] * 1.1, UNCOND[1]])
    guidance.combine({"cond": COND, "uncond": near}, 1, 4, memory)
    assert guidance.needed(2, 4, memory) == ("uncond", "cond"), "one of two samples does not agree yet"
    guidance.combine({"cond": COND, "uncond": COND * 1.1}, 2, 4, memory)
    assert guidance.needed(3, 4, memory) == ("cond",)
    assert torch.equal(guidance.combine({"cond": COND}, 3, 4, memory), COND)
    assert guidance.needed(0, 4, memory) == ("uncond", "cond"), "a new run begins anew"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cgf", "did you mean cfg"), ("apg:etta=1", "did you mean eta"), ("cfg:eta=1", "of 'apg', not of 'cfg'"),
        ("apg:dims=xyz", "letters of cthw"), ("cfg:start=0.5,stop=0.5", "empty"), ("cfg:reuse=0", "reuse"),
        ("cfg:cosine=2", "cosine"), ("apg:momentum=1", "momentum"), ("cfg-zero:init=1.5", "whole number"),
        ("cfg:start", "key=value"), ("cfg:start=a", "not a number"), ("cfg:start=nan", "window"),
        (":", "names nothing"),
        ("apg:norm=-1", "negative"), ("apg:eta=inf", "finite"),
    ],
)  # fmt: skip
def test_bad_specs(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Guidance.make(5.0, 0.0, spec)
