"""Every setting that a request may give changes the video, or is refused by name before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kinetoscope import KinetoscopeError, VideoGenerator
from kinetoscope.core.errors import CompositionError, InputError
from kinetoscope.core.types import SamplingParams
from kinetoscope.engine.protocols import StrategyState
from kinetoscope.engine.strategies.standard import StandardStrategy
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.pipelines.presets import PIPELINES
from kinetoscope.pipelines.stages import DenoisingStage
from models.tiny_skyreels import make_tiny_skyreels
from runtime.families import FAMILIES, edit, open_family
from tiny import make_tiny_wan

SETTINGS: dict[str, Any] = {
    "num_inference_steps": 5,
    "guidance_scale": 2.5,
    "guidance_scale_2": 2.5,
    "guidance_rescale": 0.7,
    "guidance": "cfg:stop=0.5",
    "negative_prompt": "blue",
    "flow_shift": 2.0,
    "scheduler": "dpm++",
    "strength": 0.5,
}
"""A value of each setting that is no default and not neutral."""
EXTRA: dict[str, Any] = {
    "true_cfg_scale": 3.0, "decode_timestep": 0.3, "decode_noise_scale": 0.3, "context_noise": 300,
    "warp_denoising_step": False, "dmd_denoising_steps": [1000, 500], "spatial_refine_only": True, "t_thresh": 0.7,
    "offload_kv_cache": True, "num_cond_frames": 5, "use_kv_cache": True, "enhance_hf": True, "use_distill": True,
}  # fmt: skip


def is_other(
    generator: VideoGenerator, base: Any, request: dict[str, Any], name: str, value: Any, said: pytest.LogCaptureFixture
) -> bool:
    """Whether a setting makes another video, or is refused by name, or a warning says that it is not read."""
    said.clear()
    try:
        result = generator.generate_video("a cat", **request | {name: value})
    except KinetoscopeError as error:
        assert name in str(error), f"{name}={value!r} is refused without its name: {error}"
        return True
    if f"{name}={value!r}: is read by" in said.text:
        return True
    return not torch.equal(result.latents, base.latents) or not np.array_equal(result.frames, base.frames)


@pytest.mark.parametrize("family", FAMILIES)
def test_setting_changes_the_video_or_is_refused(family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    generator = open_family(family, tmp_path / "model")
    named = set(generator.pipeline.extra_defaults)
    settings = SETTINGS | {name: value for name, value in EXTRA.items() if name in named}
    for more in ({}, {"guidance_scale": 1.0}):
        negative = "a" if family == "cosmos" and not more else None  # the published one is too long for the tokenizer
        request = {"num_inference_steps": 3, **FAMILIES[family].fields, "negative_prompt": negative} | more
        request = FAMILIES[family].request(**request)  # LTX's levels of two steps are the same for every shift
        base = generator.generate_video("a cat", **request)
        ignored = [
            n for n, v in settings.items() if n not in more and not is_other(generator, base, request, n, v, caplog)
        ]
        assert ignored == [], f"{family} with {more} takes {ignored} and drops them"


@pytest.mark.parametrize("pipeline", sorted(set(PIPELINES.values()), key=lambda p: p.__name__))
def test_declared_names_are_settings_of_the_pipeline(pipeline: type[ComposedPipeline]) -> None:
    known = {*SamplingParams.__dataclass_fields__, *pipeline.extra_defaults}
    for unread in pipeline.unread:
        assert set(unread.names) <= known, (pipeline, unread.names)
    covered = {name for unread in pipeline.unread for name in unread.names}
    assert {"negative_prompt", "guidance", "guidance_rescale"} <= covered


@pytest.fixture(scope="module")
def few_steps(tmp_path_factory: pytest.TempPathFactory) -> VideoGenerator:
    path = make_tiny_wan(tmp_path_factory.mktemp("few"))
    edit(path / "model_index.json", _class_name="WanDMDPipeline")
    return VideoGenerator.from_pretrained(path, device="cpu")


@pytest.mark.parametrize(
    "field",
    [
        {"scheduler": "euler"},
        {"num_inference_steps": 7},
        {"guidance_scale": 3.0},
        {"guidance_rescale": 0.5},
        {"guidance": "cfg-zero"},
    ],
)
def test_few_step_model_refuses_before_anything_is_loaded(few_steps: VideoGenerator, field: dict[str, Any]) -> None:
    (name,) = field
    with pytest.raises(InputError, match=f"{name}="):
        few_steps.generate_video("a cat", height=32, width=32, num_frames=5, **field)
    assert set(few_steps.pipeline.loaded_modules()) <= {"scheduler"}


@pytest.mark.parametrize("field", [{"guidance_scale": 1.0}, {"negative_prompt": ""}, {"guidance_rescale": 0.0}])
def test_value_that_asks_for_nothing_is_taken(few_steps: VideoGenerator, field: dict[str, Any]) -> None:
    few_steps.generate_video("a cat", height=32, width=32, num_frames=5, **field)


def test_shift_that_the_schedule_does_not_read_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    path = make_tiny_wan(tmp_path)
    file = path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_karras_sigmas": True}))
    generator = VideoGenerator.from_pretrained(path, device="cpu")
    for shift in (1.0, 9.0):
        with pytest.raises(InputError, match=f"flow_shift={shift:g}: the noise levels"):
            generator.generate_video("a cat", height=32, width=32, num_frames=5, flow_shift=shift)
    assert set(generator.pipeline.loaded_modules()) == {"scheduler"}


class OwnSteps(StandardStrategy):
    """Euler steps that leave the solver of the run out."""

    def scheduler_step(self, state: StrategyState, noise_pred: Tensor, t: float) -> Tensor:
        assert state.scheduler is not None
        now, after = state.scheduler.sigmas[state.active.index : state.active.index + 2]
        return state.latents + (after - now) * noise_pred


def test_solver_that_a_strategy_leaves_out_is_refused(tmp_path: Path) -> None:
    request: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2}
    path = make_tiny_wan(tmp_path, scheduler="euler")
    own = VideoGenerator.from_pretrained(path, device="cpu")
    plain = own.generate_video("a cat", **request)
    stage = own.pipeline.stages["denoising"]
    assert isinstance(stage, DenoisingStage)
    stage.strategy_cls = OwnSteps
    assert torch.equal(own.generate_video("a cat", **request).latents, plain.latents)  # nobody chose a solver
    with pytest.raises(CompositionError, match=r"scheduler='heun': OwnSteps\.scheduler_step"):
        own.generate_video("a cat", scheduler="heun", **request)
    stage.strategy_cls = type("Calls", (OwnSteps,), {"scheduler_step": StandardStrategy.scheduler_step})
    own.generate_video("a cat", scheduler="heun", **request)


def test_default_shift_that_the_schedule_does_not_read_is_left_out(tmp_path: Path) -> None:
    path = make_tiny_skyreels(tmp_path, "SkyReelsV2Pipeline")
    edit(path / "scheduler" / "scheduler_config.json", use_karras_sigmas=True)
    generator = VideoGenerator.from_pretrained(path, device="cpu")
    usual = generator.defaults().flow_shift
    assert usual is not None
    request: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2}
    result = generator.generate_video("a cat", **request)
    assert result.params.flow_shift is None
    again = generator.generate_video("a cat", flow_shift=usual, **request)  # as records of it say
    assert torch.equal(again.latents, result.latents)
    with pytest.raises(InputError, match="flow_shift=2: the noise levels"):
        generator.generate_video("a cat", flow_shift=2.0, **request)
    other = generator.generate_video("a cat", scheduler="euler", **request)
    assert other.params.flow_shift == usual


def test_solver_of_a_few_step_model_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="scheduler='euler': this model was distilled"):
        VideoGenerator.from_pretrained("tiny-t2v-4step", device="cpu", scheduler="euler")


@pytest.mark.parametrize(
    ("model", "option", "said"),
    [
        ("tiny-t2v-4step", {"cfg": "batched"}, "cfg='batched': tiny-t2v-4step has one branch a step"),
        ("tiny-t2v", {"autocast": True}, "autocast=True: the weights and dtype are both float32"),
        ("tiny-t2v-4step", {"cfg": "auto"}, ""),
        ("tiny-t2v", {"cfg": "batched"}, ""),
        ("tiny-t2v", {"autocast": True, "dtype": "bfloat16"}, ""),
    ],
)
def test_option_without_effect_is_said(
    model: str, option: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    VideoGenerator.from_pretrained(model, device="cpu", **option)
    assert said in caplog.text and ("changes nothing" in caplog.text) == bool(said)
