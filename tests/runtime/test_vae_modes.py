"""How latents are decoded: whole, a latent frame at a time, or in tiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kinetoscope import VideoGenerator
from kinetoscope.core.errors import CompositionError, ConfigError
from kinetoscope.pipelines.stages.decoding import FrameStream
from runtime.families import FAMILIES, SHORT, open_family
from tiny import make_tiny_wan


@pytest.mark.parametrize("kind", ["t2v", "ti2v"])
def test_streaming_gives_the_same_frames(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for several samples, and never more than one latent frame in one call of the decoder."""
    path = make_tiny_wan(tmp_path, kind=kind)
    sizes: list[int] = []
    original = FrameStream.decode
    monkeypatch.setattr(FrameStream, "decode", lambda self, z: sizes.append(z.shape[1]) or original(self, z))
    request = {"height": 32, "width": 48, "num_frames": 13, "num_inference_steps": 2, "seed": [1, 2], "batch_size": 2}
    whole, streamed = (
        VideoGenerator.from_pretrained(path, device="cpu", vae=mode).generate_video([SHORT, "a"], **request)
        for mode in ("whole", "streaming")
    )
    assert sizes == [1] * 8
    for a, b in zip(whole, streamed, strict=True):
        assert np.array_equal(a.frames, b.frames) and a.frames.shape == (13, 32, 48, 3)
        assert a.frames.std() > 5


def test_tiles_change_frames_a_little(tmp_path: Path) -> None:
    path = make_tiny_wan(tmp_path)
    request = FAMILIES["wan"].request(height=64, width=64)
    whole = VideoGenerator.from_pretrained(path, device="cpu").generate_video(SHORT, **request)
    generator = VideoGenerator.from_pretrained(path, device="cpu", vae="tiled")
    vae: Any = generator.pipeline.get_module("vae")
    assert vae.use_tiling
    vae.tile_sample_min_height = vae.tile_sample_min_width = 48
    vae.tile_sample_stride_height = vae.tile_sample_stride_width = 32
    tiled = generator.generate_video(SHORT, **request)
    assert torch.equal(tiled.latents, whole.latents)
    difference = np.abs(tiled.frames.astype(float) - whole.frames)
    assert 0 < difference.mean() < 0.3 * whole.frames.std()


@pytest.mark.parametrize(
    ("family", "options", "error", "says"),
    [
        ("wan", {"vae": "fast"}, ConfigError, "'fast'; known: whole, streaming, tiled"),
        ("ltx", {"vae": "streaming"}, CompositionError, "'streaming' and AutoencoderKLLTXVideo"),
        ("hunyuan", {"vae": "streaming"}, CompositionError, "'streaming' and ScaledDecodingStage"),
        ("wan", {"vae": "tiled", "modules": {"vae": torch.nn.Linear(1, 1)}}, CompositionError, "'tiled' and modules="),
    ],
)
def test_refused_at_start(
    tmp_path: Path, family: str, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        open_family(family, tmp_path / "model", **options)
