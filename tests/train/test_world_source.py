"""Batches of a world: a function of step and generator; latents as the recipe and as sampling have them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kinetoscope.core.errors import ConfigError
from kinetoscope.pipelines.stages.images import encode_video
from kinetoscope.train.basis import fit_basis
from kinetoscope.train.data import SourceContext, make_source, source_class
from kinetoscope.train.data.worlds import MEASURED_SEED, WorldData, WorldSource
from kinetoscope.train.loop import step_generator
from kinetoscope.train.plugins import Opened
from kinetoscope.train.recipe import WorldSection
from kinetoscope.train.vae import Clips

WORLD = WorldSection(name="shapes", height=32, width=32, num_frames=9)


@pytest.fixture(scope="module")
def opened() -> Opened:
    return Opened("tiny-t2v")


def source(opened: Opened, folder: Path, **settings: Any) -> WorldSource:
    basis = {"basis_clips": 2} if settings.get("latents") == "basis" else {}
    section = WorldData(source="world", world=WORLD, batch=3, clips=4, cache=str(folder), **basis, **settings)
    made = make_source(section, SourceContext(opened, folder))
    assert isinstance(made, WorldSource)
    return made


def test_batches(opened: Opened, tmp_path: Path) -> None:
    clips = Clips(WORLD)
    basis = fit_basis(clips.whole, 2, 12, 8, 4, MEASURED_SEED)
    vae = opened.pipeline.get_module("vae")
    oracles = {"basis": basis.latents, "encoder": lambda v: encode_video(vae, v)}
    for kind, oracle in oracles.items():
        made = source(opened, tmp_path, latents=kind)
        with torch.no_grad():
            expected = torch.cat([oracle(clips.whole(i)) for i in range(4)])
        np.testing.assert_allclose(made.latents, expected.numpy(), rtol=1e-3, atol=1e-3)  # kept in float16
        first, other, again = (made.batch(s, step_generator(0, s)) for s in (0, 1, 0))
        assert torch.equal(first.latents, again.latents) and first.captions == again.captions
        assert first.captions != other.captions
        for latents, caption in zip(first.latents, first.captions, strict=True):
            nearest = (expected - latents).square().flatten(1).mean(1).argmin()
            words = set(caption.lower().replace(",", " ").replace(".", " ").split())
            assert made.specs[int(nearest)].attributes()["colour"] in words
        assert first.latents.shape == (3, 12, 3, 4, 4) and first.text.states.shape == (3, 512, 128)
        length = int(first.text.lengths[1])
        own = opened.encoder()([first.captions[1]]).states[0]
        assert torch.equal(first.text.states[1], own) and not own[length:].any()
    assert len(list(tmp_path.glob("*.npy"))) == 2
    shorter = source(opened, tmp_path, latents="basis", frames=5).batch(0, step_generator(0, 0))
    assert shorter.latents.shape == (3, 12, 2, 4, 4)
    assert len(list(tmp_path.glob("*.npy"))) == 2, "kept latents are used again"
    none = source(opened, tmp_path, latents="none").batch(0, step_generator(0, 0))
    assert none.latents.shape == (3, 12, 3, 4, 4) and not none.latents.any()
    assert none.captions == made.batch(0, step_generator(0, 0)).captions


def test_a_world_that_looks_otherwise_has_other_latents(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = source(opened, tmp_path, latents="basis")
    drawn = Clips.sample
    monkeypatch.setattr(
        Clips, "sample", lambda self, seed: replace(clip := drawn(self, seed), frames=255 - clip.frames)
    )
    after = source(opened, tmp_path, latents="basis")
    assert len(list(tmp_path.glob("*.npy"))) == 2 and not np.array_equal(before.latents, after.latents)


def test_mistakes(opened: Opened, tmp_path: Path) -> None:
    for frames in (6, 13):
        with pytest.raises(ConfigError, match=f"data.frames={frames}"):
            source(opened, tmp_path, frames=frames)
    with pytest.raises(ConfigError, match=r"unknown data source 'x'.*world"):
        source_class("x")
