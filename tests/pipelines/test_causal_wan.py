"""Causal Wan directories from request to frames; what a rollout computes is proved in tests/engine/test_causal.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from kinetoscope import VideoGenerator
from kinetoscope.core.errors import InputError
from kinetoscope.core.types import ExecutionArgs, ForwardBatch
from kinetoscope.diffusion.few_step import FewStepSchedule
from kinetoscope.diffusion.noise import NoiseSource
from kinetoscope.loading import resolve_model
from kinetoscope.models.wan.causal import CausalWanConfig, CausalWanTransformer3DModel
from kinetoscope.pipelines.presets import build_pipeline
from tiny import make_tiny_wan

PROMPT, NEGATIVE, SEEDS = "a red circle moving left on black", "a blue cat", [3, 4]
HEIGHT, WIDTH = 32, 48
STEPS = [1000, 750, 500, 250]


def make_directory(path: Path, kind: str = "t2v", **config: Any) -> Path:
    """A tiny Wan directory as self-forcing models are published."""
    make_tiny_wan(path, kind=kind)
    edit(path / "model_index.json", _class_name="WanCausalDMDPipeline")
    for name in ("transformer", "transformer_2")[: 2 if kind == "a14b" else 1]:
        edit(path / "model_index.json", **{name: ["diffusers", "CausalWanTransformer3DModel"]})
        edit(path / name / "config.json", _class_name="CausalWanTransformer3DModel", **config)
    edit(path / "model_index.json", scheduler=["diffusers", "SelfForcingFlowMatchScheduler"])
    return path


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def open_model(path: Path) -> VideoGenerator:
    return VideoGenerator.from_pretrained(path, device="cpu", dtype="float32")


def picture() -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


@torch.no_grad()
def written_out(path: Path, blocks: list[int], first: Tensor | None = None) -> Tensor:
    """The rollout without a cache, around the same files: text by diffusers, all frames again for each prediction."""
    from diffusers import WanPipeline, WanTransformer3DModel

    config = CausalWanConfig.from_dict(json.loads((path / "transformer" / "config.json").read_text()))
    weights = WanTransformer3DModel.from_pretrained(path / "transformer").state_dict()
    model = CausalWanTransformer3DModel(config)
    model.load_state_dict(weights)
    oracle = WanPipeline.from_pretrained(path, transformer=None, scheduler=None)
    text, _ = oracle.encode_prompt([PROMPT] * 2, do_classifier_free_guidance=False, max_sequence_length=512)
    schedule = FewStepSchedule.make(STEPS, 5.0, warp=True)
    source = NoiseSource(SEEDS)
    done = torch.empty(2, 16, 0, HEIGHT // 8, WIDTH // 8) if first is None else first
    for index, size in enumerate(blocks):
        if first is not None and index == 0:
            continue
        noise = source.fork(index)
        x = noise.draw((16, size, HEIGHT // 8, WIDTH // 8))
        for step, t in enumerate(schedule.times):
            past = torch.zeros(2, done.shape[2])
            timestep = torch.cat([past, torch.full((2, size), t)], 1)
            v = model(torch.cat([done, x], 2), timestep, text, blocks=blocks[: index + 1])[:, :, done.shape[2] :]
            x = schedule.step(step, x, v, lambda n=noise, s=x.shape[1:]: n.draw(s))
        done = torch.cat([done, x], 2)
    return done


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_directory(tmp_path_factory.mktemp("causal"))


def make(ours: VideoGenerator, frames: int, **more: Any) -> Any:
    return ours.generate_video([PROMPT] * 2, NEGATIVE, HEIGHT, WIDTH, frames, seed=SEEDS, **more)


def test_text_to_video(plain: Path) -> None:
    results = make(open_model(plain), 21)
    expected = written_out(plain, [3, 3])
    for result, theirs in zip(results, expected, strict=True):
        assert (result.latents - theirs).abs().max() <= 1e-4 * expected.std()
        assert result.frames.shape == (21, HEIGHT, WIDTH, 3)


def test_image_to_video(plain: Path) -> None:
    """One frame and blocks; the image is the first frame of the video."""
    ours = open_model(plain)
    results = make(ours, 25, image=picture())
    vae = ours.pipeline.get_module("vae")
    pixels = torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1
    with torch.no_grad():
        z = vae.encode(pixels).latent_dist.mode()
    mean, std = (torch.tensor(vae.config[k]).view(1, -1, 1, 1, 1) for k in ("latents_mean", "latents_std"))
    expected = written_out(plain, [1, 3, 3], ((z - mean) / std).repeat(2, 1, 1, 1, 1))
    for result, theirs in zip(results, expected, strict=True):
        assert (result.latents - theirs).abs().max() <= 1e-4 * expected.std()
        assert len(result.frames) == 25


def test_two_experts_leave_the_rest_out(tmp_path: Path) -> None:
    path = make_directory(tmp_path, "a14b", num_frames_per_block=2)
    ours = open_model(path)
    assert ours.defaults().num_inference_steps == 8
    result = make(ours, 21)[0]  # 6 latent frames: 1 + 2 + 2, one is left out
    assert result.latents.shape[1] == 5 and len(result.frames) == 17
    longer = make(ours, 17)[0]
    assert torch.equal(result.latents, longer.latents)
    assert result.params.num_frames == result.record["params"]["num_frames"] == 17, "what was made, not what was asked"
    noise = torch.randn(2, 16, 6, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(0))
    cut = make(ours, 17, latents=noise[:, :, :5])[0]
    assert torch.equal(make(ours, 21, latents=noise)[0].latents, cut.latents)


def test_guidance_and_window_by_request(plain: Path) -> None:
    ours = open_model(plain)
    plainly, guided, windowed = (
        make(ours, 33, **more)[0].latents
        for more in ({}, {"guidance_scale": 3.0}, {"local_attn_size": 4, "sink_size": 1, "context_noise": 20})
    )
    assert torch.equal(plainly[:, :3], windowed[:, :3]) and not torch.equal(plainly, windowed)
    assert not torch.allclose(plainly, guided, atol=1e-2)


@torch.no_grad()
def test_a_stream_is_the_offline_video(plain: Path) -> None:
    """The engine of the denoising stage, opened as a stream on the batch that the stages before it make."""
    pipeline: Any = build_pipeline(resolve_model(str(plain)), ExecutionArgs())
    batch = ForwardBatch(pipeline.defaults(), [PROMPT] * 2, [""] * 2, SEEDS)
    sized = {"height": HEIGHT, "width": WIDTH, "num_frames": 33}
    batch.params = type(batch.params)(**sized).over(batch.params)
    for name, stage in pipeline.stages.items():
        if name == "denoising":
            break
        batch = stage.forward(batch, pipeline.args)
    batch.family = type(batch.family)(16, HEIGHT // 8, WIDTH // 8)  # no end
    engine = pipeline.stages["denoising"].engine(batch)
    stream = engine.streaming_reset(batch, pipeline.args)
    blocks = [engine.streaming_step(stream, None) for _ in range(3)]
    engine.streaming_clear(stream)
    expected = torch.stack([r.latents for r in make(open_model(plain), 33)])
    assert torch.equal(torch.cat(blocks, 2), expected)


@pytest.mark.parametrize(
    ("frames", "fields", "words"),
    [
        (17, {}, "num_frames=17 are 5 latent frames of 4: 5 latent frames are no blocks of 3; nearest: 3 or 6"),
        (93, {}, "24 latent frames, more than the 21 .* at most 81 frames"),
        (21, {"num_inference_steps": 8}, "distilled for the 4 timesteps"),
        (21, {"video": "clip.mp4"}, "takes no video"),
        (9, {"image": np.zeros((8, 8, 3), np.uint8)}, "no block to make after the image; ask for 13"),
        (21, {"context_noise": "x"}, "context_noise='x'"),
        (21, {"context_noise": 1001}, "context_noise=1001"),
        (21, {"local_attn_size": "x"}, "local_attn_size='x'"),
        (21, {"local_attn_size": 6.0}, "local_attn_size=6.0"),
        (21, {"local_attn_size": 65}, r"local_attn_size=65 should be .* in \[-1, 64\]"),
        (21, {"local_attn_size": 4, "sink_size": 2}, "no room for the sink and a block of 3"),
        (21, {"sink_size": 19}, "no room"),
        (21, {"sink_size": [1]}, "sink_size="),
        (21, {"scheduler": "euler"}, "no solver to choose"),
        (21, {"warp_denoising_step": "no"}, "warp_denoising_step='no' is neither true nor false"),
        (21, {"strength": 0.5}, "takes no video"),
    ],
)
def test_refused_before_anything_loads(plain: Path, frames: int, fields: dict[str, Any], words: str) -> None:
    ours = open_model(plain)
    with pytest.raises(InputError, match=words):
        make(ours, frames, **fields)
    assert not ours.pipeline.loaded_modules()
