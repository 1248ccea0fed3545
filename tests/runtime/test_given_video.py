"""A given video: its length is the default of `num_frames`, and its frames are taken by time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kinetoscope.core.errors import InputError
from kinetoscope.core.types import SamplingParams
from kinetoscope.media import write_video
from kinetoscope.pipelines.stages.validation import VideoGeometry
from kinetoscope.runtime.request import VideoPlan, VideoRequest

DEFAULTS = SamplingParams(
    height=64, width=64, num_frames=33, fps=12.0, num_inference_steps=30, guidance_scale=4.0, flow_shift=3.0
)


def greys(count: int) -> np.ndarray[Any, Any]:
    return np.stack([np.full((64, 64, 3), 5 * i, np.uint8) for i in range(count)])


def plan(video: Any, **fields: Any) -> VideoPlan:
    how = {k: fields.pop(k) for k in ("continues", "follows") if k in fields}
    return VideoRequest("a cat", video=video, **fields).plan(
        DEFAULTS, VideoGeometry(), {"video": True}, {"kept": None}, **how
    )


def shades(made: VideoPlan) -> list[int]:
    assert made.video is not None
    return [round(float(v + 1) * 127.5 / 5) for v in made.video[0, :, :, 32, 32].mean(0)]


@pytest.mark.parametrize("kind", [{}, {"follows": True}])
@pytest.mark.parametrize(("given", "made"), [(9, 9), (8, 5), (3, 1), (40, 37)])
def test_length_of_a_video_is_the_default_of_num_frames(
    given: int, made: int, kind: dict[str, bool], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "kinetoscope")
    result = plan(greys(given), **kind)
    assert result.params.num_frames == made and shades(result) == list(range(made))
    assert f"num_frames={made}: the given video has {given} frames" in caplog.text


def test_asked_length_is_kept_or_refused() -> None:
    assert plan(greys(40), num_frames=17).params.num_frames == 17
    with pytest.raises(InputError, match="has 9 frames and num_frames=17 are asked for; leave num_frames out"):
        plan(greys(9), num_frames=17)


def test_continued_video_leaves_num_frames_and_gives_its_end() -> None:
    """A model keeps fewer frames than it makes, or as many as a parameter of its family says."""
    made = plan(greys(50), continues=True)
    assert made.params.num_frames == 33 and shades(made) == list(range(17, 50))
    made = plan(greys(50), continues=True, num_frames=9, extra={"kept": 13})
    assert shades(made) == list(range(37, 50))
    assert shades(plan(greys(9), continues=True)) == list(range(9))


def test_frames_of_a_file_are_taken_at_the_rate_of_the_request(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", greys(49), 24)
    made = plan(path)  # two seconds at 12 frames a second
    assert made.params.num_frames == 25 and np.abs(np.subtract(shades(made), range(0, 50, 2))).max() <= 1
    made = plan(path, fps=24)
    assert made.params.num_frames == 49 and np.abs(np.subtract(shades(made), range(49))).max() <= 1
    assert plan(greys(49)).params.num_frames == 49  # an array has no rate


def test_video_is_shared_by_all_prompts() -> None:
    made = VideoRequest(["a cat", "a dog"], video=greys(9)).plan(DEFAULTS, VideoGeometry(), {"video": True})
    assert made.video is not None and made.video.shape == (2, 3, 9, 64, 64)
    assert made.video[0].data_ptr() == made.video[1].data_ptr()


def test_numbers_of_numpy_are_numbers() -> None:
    made = VideoRequest(
        ["a cat", "a dog"], height=np.int64(32), fps=np.float32(8), seed=np.array([3, 4]), batch_size=np.int32(1)
    ).plan(DEFAULTS, VideoGeometry())  # pyright: ignore[reportArgumentType]
    assert (made.params.height, made.params.fps, made.seeds) == (32, 8.0, [3, 4])
    assert type(made.params.height) is int and type(made.seeds[0]) is int
    for field in ({"height": np.float64(32.5)}, {"height": np.bool_(True)}, {"fps": np.float32("nan")}):
        with pytest.raises(InputError):
            VideoRequest("a cat", **field).plan(DEFAULTS, VideoGeometry())
