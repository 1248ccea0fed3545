"""Guidance against its formula and against diffusers' own."""

from __future__ import annotations

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from kinetoscope.core.errors import InputError
from kinetoscope.diffusion.guidance import Guidance, cfg_zero_scale
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
