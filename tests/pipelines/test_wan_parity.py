"""The whole path against diffusers' WanPipeline, on the same files: embeddings, forward, latents, frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kinetoscope import VideoGenerator
from kinetoscope.core.types import ExecutionArgs
from kinetoscope.diffusion.noise import NoiseSource
from kinetoscope.loading import resolve_model
from kinetoscope.pipelines.presets import build_pipeline
from tiny import make_tiny_wan

PROMPT, NEGATIVE = "a red circle moving left on black", "a blue cat"
STEPS = 8


@pytest.fixture(scope="module", params=["unipc", "euler", "dpm++", "heun"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[VideoGenerator, Any]:
    """Ours and theirs, opened from one directory."""
    from diffusers import WanPipeline

    path = make_tiny_wan(tmp_path_factory.mktemp("wan"), scheduler=request.param)
    oracle = WanPipeline.from_pretrained(path)
    oracle.set_progress_bar_config(disable=True)
    return VideoGenerator.from_pretrained(path, device="cpu", dtype="float32"), oracle


def oracle_run(oracle: Any, output: str, size: tuple[int, int, int], guidance: float, seeds: list[int]) -> Any:
    frames, height, width = size
    return oracle(
        prompt=[PROMPT] * len(seeds),
        negative_prompt=[NEGATIVE] * len(seeds),
        num_frames=frames,
        height=height,
        width=width,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        generator=[torch.Generator("cpu").manual_seed(s) for s in seeds],
        output_type=output,
    ).frames


def our_run(
    generator: VideoGenerator, size: tuple[int, int, int], guidance: float, seeds: list[int], **more: Any
) -> Any:
    frames, height, width = size
    return generator.generate_video(
        [PROMPT] * len(seeds),
        NEGATIVE,
        height,
        width,
        frames,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        seed=seeds,
        **more,
    )


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("size", [(5, 32, 48), (9, 48, 32), (1, 32, 32)])
def test_latents_and_frames(pair: tuple[VideoGenerator, Any], size: tuple[int, int, int], guidance: float) -> None:
    ours, oracle = pair
    theirs = oracle_run(oracle, "latent", size, guidance, [3])[0]
    result = our_run(ours, size, guidance, [3])[0]
    assert (result.latents - theirs).abs().max() <= 1e-4 * theirs.std()
    video = oracle_run(oracle, "np", size, guidance, [3])[0]
    assert result.frames.shape == video.shape
    assert np.abs(result.frames - video * 255.0).max() <= 1.0


@pytest.mark.parametrize("cfg", ["sequential", "batched"])
def test_a_batch_of_prompts(pair: tuple[VideoGenerator, Any], cfg: str) -> None:
    ours, oracle = pair
    theirs = oracle_run(oracle, "latent", (5, 32, 32), 5.0, [1, 2])
    ours.pipeline.args = ExecutionArgs(cfg=cfg, attention=ours.pipeline.args.attention)
    results = our_run(ours, (5, 32, 32), 5.0, [1, 2])
    for result, expected in zip(results, theirs, strict=True):
        assert (result.latents - expected).abs().max() <= 1e-4 * expected.std()


def test_prompt_embeddings(tmp_path: Path) -> None:
    from diffusers import WanPipeline

    path = make_tiny_wan(tmp_path)
    oracle = WanPipeline.from_pretrained(path)
    prompts = [PROMPT, "  a   cat&amp;amp; circle ", "x" * 200]
    theirs, _ = oracle.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=512)
    stage: Any = build_pipeline(resolve_model(str(path)), ExecutionArgs()).stages["text_encoding"]
    ours, lengths = stage.encode(prompts, torch.device("cpu"))
    assert ours.shape == theirs.shape == (3, 512, 32)
    assert (ours - theirs).abs().max() <= 1e-5
    for row, length in zip(theirs, lengths.tolist(), strict=True):
        assert row[:length].abs().sum(1).min() > 0
        assert row[length:].abs().max() == 0


def test_given_latents_replace_the_noise(pair: tuple[VideoGenerator, Any]) -> None:
    ours, _ = pair
    noise = NoiseSource([42]).draw((16, 2, 4, 4))
    given = our_run(ours, (5, 32, 32), 2.0, [0], latents=noise)[0]
    seeded = our_run(ours, (5, 32, 32), 2.0, [42])[0]
    assert torch.equal(given.latents, seeded.latents)


def test_a_wrong_guidance_sign_would_be_seen(pair: tuple[VideoGenerator, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The parity tests can fail: u - w (c - u) is far outside their tolerance."""
    from kinetoscope.diffusion.guidance import Guidance

    ours, oracle = pair
    theirs = oracle_run(oracle, "latent", (5, 32, 32), 5.0, [3])[0]
    monkeypatch.setattr(
        Guidance, "combine", lambda self, p, *_: p["uncond"].float() - self.scale * (p["cond"] - p["uncond"]).float()
    )
    assert (our_run(ours, (5, 32, 32), 5.0, [3])[0].latents - theirs).abs().max() > 1e-3 * theirs.std()
