"""What runs by name: every published model once, with defaults a request can be made of; Wan's against their source."""

from __future__ import annotations

import pytest

from kinetoscope.models.wan import spec
from kinetoscope.pipelines.catalogue import FAMILIES, known_models
from kinetoscope.reference import embedded_models

TASKS = {"t2v", "i2v", "flf2v", "v2v", "vc", "t2i", "refine", "control"}

# height, width, frames, fps, steps, guidance, guidance of the second expert, shift. Wan 2.1: model cards and diffusers'
# documentation of Wan; 2.2: wan/configs of the original repository (sample_shift, sample_steps, sample_guide_scale as
# (low, high), frame_num, sample_fps).
WAN = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": (480, 832, 81, 16, 50, 5.0, None, 3.0),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": (720, 1280, 81, 16, 50, 5.0, None, 5.0),
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": (480, 832, 81, 16, 50, 5.0, None, 3.0),
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": (720, 1280, 81, 16, 50, 5.0, None, 5.0),
    "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers": (720, 1280, 81, 16, 50, 5.5, None, 16.0),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": (720, 1280, 81, 16, 40, 4.0, 3.0, 12.0),
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": (720, 1280, 81, 16, 40, 3.5, 3.5, 5.0),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": (704, 1280, 121, 24, 50, 5.0, None, 5.0),
}


@pytest.mark.parametrize("name", WAN)
def test_wan_presets(name: str) -> None:
    p = spec.PRESETS[name]
    size = (p.height, p.width, p.num_frames, p.fps)
    assert (*size, p.num_inference_steps, p.guidance_scale, p.guidance_scale_2, p.flow_shift) == WAN[name]


def test_every_published_model_is_listed_once() -> None:
    known = known_models()
    names = [m.name for m in known]
    assert len(set(names)) == len(names)
    assert set(names) == set(embedded_models()) | {n for f in FAMILIES for n in f.presets}
    for model in known:
        p = model.defaults
        assert p.height and p.width and p.num_frames and p.num_inference_steps and p.fps, model.name
        assert model.tasks and set(model.tasks) <= TASKS, model.name
