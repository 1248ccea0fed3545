"""Whatever a request holds, checking it either accepts it or says what is wrong; nothing else ever comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kinetoscope.core.errors import InputError, KinetoscopeError
from kinetoscope.core.types import SamplingParams
from kinetoscope.pipelines.stages.validation import VideoGeometry, check_params
from kinetoscope.runtime.output_names import file_stem
from kinetoscope.runtime.request import VideoRequest

DEFAULTS = SamplingParams(
    height=64, width=64, num_frames=33, fps=12.0, num_inference_steps=30, guidance_scale=4.0, flow_shift=3.0
)
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([10**400, -(10**400), 2**63, True]))
ANYTHING = st.one_of(
    st.none(),
    NUMBERS,
    st.text(max_size=8),
    st.binary(max_size=4),
    st.lists(NUMBERS, max_size=3),
    st.just({}),
    st.just({1}),
)
FIELDS = (
    *("prompt", "negative_prompt", "height", "width", "num_frames", "fps", "num_inference_steps", "guidance_scale"),
    *("seed", "latents", "output_path", "guidance_rescale", "flow_shift", "scheduler", "batch_size"),
)


@given(st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=4))
@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_request_is_accepted_or_refused_in_words(fields: dict[str, Any]) -> None:
    request: Any = VideoRequest(**({"prompt": "a cat"} | fields))
    try:
        plan = request.plan(DEFAULTS, VideoGeometry())
    except KinetoscopeError as error:
        assert str(error)
        return
    check_params(plan.params, VideoGeometry())
    assert len(plan.prompts) == len(plan.seeds) == len(plan.negative_prompts) == len(plan.paths) > 0
    assert all(isinstance(p, str) and p.strip() for p in plan.prompts)
    assert all(isinstance(p, str) for p in plan.negative_prompts)
    assert all(0 <= s < 2**32 for s in plan.seeds)


@given(st.integers(-40, 4000), st.integers(-40, 4000), st.integers(-4, 400))
@settings(max_examples=300, deadline=None)
def test_sizes_named_as_nearest_are_accepted(height: int, width: int, frames: int) -> None:
    geometry = VideoGeometry()
    wanted = {"height": height, "width": width, "num_frames": frames}
    for name, value in wanted.items():
        try:
            geometry.check(SamplingParams(**{"height": 64, "width": 64, "num_frames": 33, name: value}))
        except InputError as error:
            _, _, nearest = str(error).partition("nearest: ")
            for near in map(int, nearest.split(" or ") if nearest else []):
                assert abs(near - value) < 16
                geometry.check(SamplingParams(**{"height": 64, "width": 64, "num_frames": 33, name: near}))


@given(st.lists(st.integers(0, 3), max_size=6))
@settings(max_examples=50, deadline=None)
def test_latents_of_any_shape(shape: list[int]) -> None:
    try:
        plan = VideoRequest("a cat", latents=torch.zeros(shape)).plan(DEFAULTS, VideoGeometry())
    except InputError:
        return
    assert plan.latents is not None and plan.latents.ndim == 5 and len(plan.latents) == 1


@given(st.text(max_size=60), st.text(max_size=20))
@settings(max_examples=200, deadline=None)
def test_any_prompt_gives_a_plain_file_name(prompt: str, other: str) -> None:
    try:
        plan = VideoRequest([prompt, other], output_path="outputs").plan(DEFAULTS, VideoGeometry())
    except InputError:
        return
    for path in plan.paths:
        assert isinstance(path, Path) and path.parent == Path("outputs") and len(path.name.encode()) < 160
        assert not set(path.name) & set(' /\\:*?"<>|\0\n') and path.name[0].isdigit()


@given(st.text(max_size=200), st.text(max_size=200))
@settings(max_examples=300, deadline=None)
def test_different_prompts_have_different_file_names(prompt: str, other: str) -> None:
    assert (file_stem(prompt) == file_stem(other)) == (prompt == other)
