"""Published few-step and causal Wan models as data, and the steps of those that keep a first frame."""

from __future__ import annotations

from typing import Any

from kinetoscope.core.types import SamplingParams
from kinetoscope.engine.strategies.dmd import FewSteps
from kinetoscope.models.wan.strategy import FirstFrameStrategy

DEFAULT_BOUNDARY = 0.875
"""Boundary of two experts where model_index.json has no `boundary_ratio`: that of Wan 2.2 T2V, as FastVideo assumes."""


def _preset(size: tuple[int, int], steps: list[int], shift: float, **values: Any) -> SamplingParams:
    extra: dict[str, Any] = {"dmd_denoising_steps": steps, "warp_denoising_step": values.pop("warp")}
    common: dict[str, Any] = {"num_frames": 81, "fps": 16.0, "guidance_scale": 1.0, "guidance_rescale": 0.0} | values
    height, width = size
    return SamplingParams(
        height=height, width=width, num_inference_steps=len(steps), flow_shift=shift, extra=extra, **common
    )


_DMD = [1000, 757, 522]
_FAST = _preset((448, 832), _DMD, 8.0, warp=False, num_frames=61)
# Its configuration names shift 5, but the published few-step stage always builds its table with 8.
_FAST_5B = _preset((704, 1280), _DMD, 8.0, warp=False, num_frames=121, fps=24.0)
_CAUSAL = _preset((480, 832), [1000, 750, 500, 250], 5.0, warp=True)
_CAUSAL_A14B = _preset((448, 832), [1000, 850, 700, 550, 350, 275, 200, 125], 12.0, warp=True)

# Sampling settings of the published models (github hao-ai-lab/FastVideo, configurations and presets of August 2026).
FEW_STEP_PRESETS: dict[str, SamplingParams] = {
    "FastVideo/FastWan2.1-T2V-1.3B-Diffusers": _FAST,
    "FastVideo/FastWan2.1-T2V-14B-480P-Diffusers": _FAST,
    "FastVideo/FastWan2.2-TI2V-5B-Diffusers": _FAST_5B,
    "FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers": _FAST_5B,
}
CAUSAL_PRESETS: dict[str, SamplingParams] = {
    "wlsaidhi/SFWan2.1-T2V-1.3B-Diffusers": _CAUSAL,
    "rand0nmr/SFWan2.2-T2V-A14B-Diffusers": _CAUSAL_A14B,
    "FastVideo/SFWan2.2-I2V-A14B-Preview-Diffusers": _CAUSAL_A14B,
    "FastVideo/CausalWan2.2-I2V-A14B-Preview-Diffusers": _CAUSAL_A14B,
}


class FirstFrameDMDStrategy(FewSteps, FirstFrameStrategy):
    """Few steps around a first frame that is given and stays (FastWan 2.2 TI2V); without one, plain few steps."""
