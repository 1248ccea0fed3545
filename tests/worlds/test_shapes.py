"""The world is what it says, and its judge reads it back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from kinetoscope.core.errors import InputError
from kinetoscope.worlds import get_world

WORLD = get_world("shapes")


def test_captions_are_many_distinct_and_split() -> None:
    train, heldout = WORLD.captions("train"), WORLD.captions("heldout")
    captions = {s.caption() for s in train + heldout}
    assert len(captions) == len(train) + len(heldout) >= 2000
    assert 0.05 < len(heldout) / len(captions) < 0.15
    for name, values in WORLD.attributes.items():
        assert {s.attributes()[name] for s in train} == set(values)


def test_clips_repeat_by_seed() -> None:
    a, b, c = WORLD.sample(3), WORLD.sample(3), WORLD.sample(4)
    assert a.frames.shape == (33, 64, 64, 3) and a.frames.dtype == np.uint8
    assert np.array_equal(a.frames, b.frames) and a.caption == b.caption
    assert not np.array_equal(a.frames, c.frames)
    assert WORLD.sample(3, "heldout").spec in WORLD.captions("heldout")


def test_wordings_vary_and_may_leave_out() -> None:
    rng = np.random.default_rng(0)
    spec = WORLD.captions()[0]
    wordings = {spec.caption(rng) for _ in range(200)}
    assert len(wordings) > 20
    assert any("background" not in w for w in wordings)


@pytest.mark.parametrize("size", [(64, 64), (48, 96), (128, 80)])
def test_the_shape_stays_in_the_frame(size: tuple[int, int]) -> None:
    height, width = size
    for seed in range(40):
        clip = WORLD.sample(seed, height=height, width=width)
        still = np.abs(clip.frames.astype(int) - clip.frames[:1].astype(int)).sum()
        assert (still == 0) == (clip.spec.motion == "standing still")
        edge = np.concatenate([clip.frames[:, 0], clip.frames[:, -1]], 1)
        assert np.abs(edge.astype(int) - edge[:1].astype(int)).max() == 0


def blurred(frames: Any) -> Any:
    return np.stack([np.asarray(Image.fromarray(f).filter(ImageFilter.GaussianBlur(1.0))) for f in frames])


def noisy(frames: Any) -> Any:
    return np.clip(frames + np.random.default_rng(0).normal(0, 8, frames.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("damage", "least"), [(lambda f: f, 0.995), (blurred, 0.98), (noisy, 0.98)])
def test_the_judge_reads_clips_back(damage: Any, least: float) -> None:
    wrong = dict.fromkeys(WORLD.attributes, 0)
    count = 60
    for seed in range(count):
        clip = WORLD.sample(10_000 + seed)
        seen = WORLD.judge(damage(clip.frames))
        for name, value in clip.spec.attributes().items():
            wrong[name] += seen[name] != value
    assert all(1 - n / count >= least for n in wrong.values()), wrong


def test_the_judge_tells_mistakes() -> None:
    """A clip played backwards moves the other way; a recoloured one has the other colour."""
    spec = next(s for s in WORLD.captions() if s.motion == "moving left" and s.colour == "red")
    frames = WORLD.render(spec, 0)
    assert WORLD.judge(frames[::-1])["motion"] == "moving right"
    assert WORLD.judge(frames[..., ::-1])["colour"] == "blue"


@pytest.mark.parametrize("frames", [np.zeros((3, 32, 32, 3), np.uint8), np.full((1, 64, 64, 3), 242, np.uint8)])
def test_nothing_to_see_gives_none(frames: Any) -> None:
    assert WORLD.judge(frames)["colour"] is None


def test_mistakes_are_explained() -> None:
    with pytest.raises(InputError, match="shapes"):
        get_world("shape")
    with pytest.raises(InputError, match="heldout"):
        WORLD.captions("test")
    with pytest.raises(InputError, match="sides"):
        WORLD.render(WORLD.captions()[0], 0, height=4)
    for frames in (np.zeros((3, 8, 8), np.uint8), np.zeros((3, 8, 8, 3), np.float32), np.zeros((0, 8, 8, 3), np.uint8)):
        with pytest.raises(InputError):
            WORLD.judge(frames)
