"""Few-step Wan directories: the published steps written out around diffusers' transformer, on the same files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from kinetoscope import VideoGenerator
from kinetoscope.core.errors import InputError
from kinetoscope.core.types import ExecutionArgs
from kinetoscope.diffusion.noise import NoiseSource
from kinetoscope.loading import resolve_model
from kinetoscope.models.wan.distilled import CAUSAL_PRESETS, FEW_STEP_PRESETS
from kinetoscope.pipelines.presets import build_pipeline
from tiny import make_tiny_wan

PROMPT, SEEDS = "a red circle moving left on black", [3, 4]
FRAMES, HEIGHT, WIDTH = 9, 32, 48
DMD, DMD_IMAGE = "WanDMDPipeline", "WanImageToVideoDmdPipeline"
LONG = [1000, 850, 700, 550, 350, 275, 200, 125]


def make_directory(path: Path, kind: str = "t2v") -> Path:
    """A tiny Wan directory as few-step models are published: the same parts under another name."""
    make_tiny_wan(path, kind=kind)
    index = path / "model_index.json"
    values = json.loads(index.read_text())
    values["_class_name"] = DMD_IMAGE if kind in ("i2v", "i2v-a14b") else DMD
    index.write_text(json.dumps(values))
    return path


def add_gates(path: Path) -> None:
    """The gates of video sparse attention, under their published names."""
    (file,) = (path / "transformer").glob("*.safetensors")
    weights = load_file(file)
    width = weights["blocks.0.attn1.to_q.weight"].shape[0]
    generator = torch.Generator().manual_seed(0)
    for block in {name.split(".")[1] for name in weights if name.startswith("blocks.")}:
        weights[f"blocks.{block}.to_gate_compress.weight"] = torch.randn(width, width, generator=generator)
        weights[f"blocks.{block}.to_gate_compress.bias"] = torch.randn(width, generator=generator)
    save_file(weights, file, metadata={"format": "pt"})


def open_model(path: Path) -> VideoGenerator:
    return VideoGenerator.from_pretrained(path, device="cpu", dtype="float32")


def open_oracle(path: Path) -> Any:
    import diffusers

    index = json.loads((path / "model_index.json").read_text())
    name = "WanImageToVideoPipeline" if index["_class_name"] == DMD_IMAGE else "WanPipeline"
    return getattr(diffusers, name).from_pretrained(path)


def picture() -> Image.Image:
    """Smooth random colours at the size of the request."""
    small = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def written_out(
    velocity: Callable[[Tensor, float], Tensor],
    steps: list[int],
    shift: float,
    channels: int,
    keep: Tensor | None = None,
) -> Tensor:
    """The published loop: x0 = x - s v in float64, s at the nearest time of the shifted table; fresh noise."""
    source = NoiseSource(SEEDS)
    shape = (channels, (FRAMES - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8)
    table = [shift * k / 1000 / (1 + (shift - 1) * k / 1000) for k in range(1, 1001)]
    x = source.draw(shape)
    for index, t in enumerate(steps):
        if keep is not None:
            x = torch.cat([keep, x[:, :, 1:]], 2)
        s = min(table, key=lambda level: abs(1000 * level - t))
        x = (x.double() - s * velocity(x, float(t)).double()).float()
        if index + 1 < len(steps):
            after = min(table, key=lambda level: abs(1000 * level - steps[index + 1]))
            x = (1 - after) * x + after * source.draw(shape)
    return x if keep is None else torch.cat([keep, x[:, :, 1:]], 2)


def make(ours: VideoGenerator, **more: Any) -> Tensor:
    results = ours.generate_video([PROMPT] * 2, "", HEIGHT, WIDTH, FRAMES, seed=SEEDS, **more)
    return torch.stack([r.latents for r in results])


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert (got - expected).abs().max() <= 1e-4 * expected.std()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_directory(tmp_path_factory.mktemp("fast"))


@torch.no_grad()
def text_to_video(path: Path, steps: list[int], shift: float) -> Tensor:
    oracle = open_oracle(path)
    text, _ = oracle.encode_prompt([PROMPT] * 2, do_classifier_free_guidance=False, max_sequence_length=512)
    return written_out(
        lambda x, t: oracle.transformer(x, torch.full((2,), t), text, return_dict=False)[0], steps, shift, 16
    )


def test_text_to_video(plain: Path) -> None:
    ours = open_model(plain)
    assert_close(make(ours), text_to_video(plain, [1000, 757, 522], 8.0))
    asked = {"dmd_denoising_steps": [900, 600, 300, 100], "flow_shift": 3.0}
    assert_close(make(ours, **asked), text_to_video(plain, asked["dmd_denoising_steps"], 3.0))


def test_gates_present_or_absent(plain: Path, tmp_path: Path) -> None:
    """They load, keep their values, and dense attention does not read them."""
    path = tmp_path / "gates"
    shutil.copytree(plain, path)
    add_gates(path)
    with_gates, without = open_model(path), open_model(plain)
    assert torch.equal(make(with_gates), make(without))
    stored = load_file(next((path / "transformer").glob("*.safetensors")))
    loaded = with_gates.pipeline.get_module("transformer").state_dict()
    assert loaded.keys() == stored.keys()
    assert torch.equal(loaded["blocks.1.to_gate_compress.weight"], stored["blocks.1.to_gate_compress.weight"])
    assert not any("gate_compress" in k for k in without.pipeline.get_module("transformer").state_dict())


@torch.no_grad()
def test_image_to_video(tmp_path: Path) -> None:
    path = make_directory(tmp_path, "i2v")
    oracle = open_oracle(path)
    text, _ = oracle.encode_prompt([PROMPT] * 2, do_classifier_free_guidance=False, max_sequence_length=512)
    pixels = oracle.video_processor.preprocess(picture(), HEIGHT, WIDTH).float()
    _, condition = oracle.prepare_latents(
        pixels, 1, 16, HEIGHT, WIDTH, FRAMES, torch.float32, torch.device("cpu"),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    features = oracle.encode_image(picture(), "cpu").repeat(2, 1, 1)
    condition = condition.repeat(2, 1, 1, 1, 1)

    def velocity(x: Tensor, t: float) -> Tensor:
        rows = torch.cat([x, condition], 1)
        return oracle.transformer(rows, torch.full((2,), t), text, features, return_dict=False)[0]

    assert_close(make(open_model(path), image=picture()), written_out(velocity, [1000, 757, 522], 8.0, 16))


@torch.no_grad()
@pytest.mark.parametrize("given", [False, True])
def test_first_frame_model(tmp_path: Path, given: bool) -> None:
    """TI2V: plain from text; with an image its frame is read clean at time 0 and kept."""
    path = make_directory(tmp_path, "ti2v")
    oracle = open_oracle(path)
    text, _ = oracle.encode_prompt([PROMPT] * 2, do_classifier_free_guidance=False, max_sequence_length=512)
    keep = None
    if given:
        pixels = torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1
        z = oracle.vae.encode(pixels).latent_dist.mode()
        mean, std = (torch.tensor(oracle.vae.config[k]).view(1, -1, 1, 1, 1) for k in ("latents_mean", "latents_std"))
        keep = ((z - mean) / std).repeat(2, 1, 1, 1, 1)

    def velocity(x: Tensor, t: float) -> Tensor:
        tokens = x.shape[-1] * x.shape[-2] // 4
        timestep = torch.full((2, x.shape[2] * tokens), t)
        if given:
            timestep[:, :tokens] = 0
        return oracle.transformer(x, timestep, text, return_dict=False)[0]

    more = {"image": picture()} if given else {}
    assert_close(make(open_model(path), **more), written_out(velocity, [1000, 757, 522], 8.0, 16, keep))


@torch.no_grad()
def test_two_experts(tmp_path: Path) -> None:
    """The high-noise expert's prediction goes to the boundary, noise from there up; crossing it noises nothing."""
    path = make_directory(tmp_path, "a14b")
    oracle = open_oracle(path)
    text, _ = oracle.encode_prompt([PROMPT] * 2, do_classifier_free_guidance=False, max_sequence_length=512)
    got = make(open_model(path), dmd_denoising_steps=LONG, warp_denoising_step=True, flow_shift=12.0)
    source = NoiseSource(SEEDS)
    shape = (16, (FRAMES - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8)
    levels = [12 * t / (1000 + 11 * t) for t in LONG]
    b = min((12 * k / (1000 + 11 * k) for k in range(1, 1001)), key=lambda s: abs(s - 0.875))
    x = source.draw(shape)
    for s, after in zip(levels, [*levels[1:], None], strict=True):
        network = oracle.transformer if s >= 0.875 else oracle.transformer_2
        v = network(x, torch.full((2,), 1000 * s), text, return_dict=False)[0]
        x = x - (s - b if s >= 0.875 else s) * v
        if after is None or after < 0.875 <= s:
            continue
        if after >= 0.875:
            alpha = (1 - after) / (1 - b)
            x = alpha * x + (after**2 - (alpha * b) ** 2) ** 0.5 * source.draw(shape)
        else:
            x = (1 - after) * x + after * source.draw(shape)
    assert_close(got, x)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"guidance_scale": 5.0}, "guidance is distilled"),
        ({"num_inference_steps": 4}, "distilled for the 3 timesteps"),
        ({"dmd_denoising_steps": "fast"}, "dmd_denoising_steps"),
        ({"dmd_denoising_steps": [500, 1000]}, "decreasing"),
        ({"dmd_denoising_step": [500]}, "did you mean dmd_denoising_steps"),
        ({"image": "picture.png"}, "takes no image"),
        ({"warp_denoising_step": "no"}, "warp_denoising_step='no' is neither true nor false"),
        ({"warp_denoising_step": 1}, "neither true nor false"),
        ({"scheduler": "unipc"}, "scheduler='unipc': .* no solver to choose"),
        ({"strength": 0.5}, "takes no video"),
    ],
)
def test_refusals(plain: Path, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        open_model(plain).generate_video(PROMPT, "", HEIGHT, WIDTH, FRAMES, **fields)


# Height, width, frames, fps, timesteps, warped, shift: github hao-ai-lab/FastVideo, commit 2f3d407,
# pipelines/basic/wan/presets.py and configs/pipelines/wan.py; the shift of the 5B model is the stage's own.
PUBLISHED = {
    "FastVideo/FastWan2.1-T2V-1.3B-Diffusers": (448, 832, 61, 16, [1000, 757, 522], False, 8),
    "FastVideo/FastWan2.1-T2V-14B-480P-Diffusers": (448, 832, 61, 16, [1000, 757, 522], False, 8),
    "FastVideo/FastWan2.2-TI2V-5B-Diffusers": (704, 1280, 121, 24, [1000, 757, 522], False, 8),
    "FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers": (704, 1280, 121, 24, [1000, 757, 522], False, 8),
    "wlsaidhi/SFWan2.1-T2V-1.3B-Diffusers": (480, 832, 81, 16, [1000, 750, 500, 250], True, 5),
    "rand0nmr/SFWan2.2-T2V-A14B-Diffusers": (448, 832, 81, 16, LONG, True, 12),
    "FastVideo/SFWan2.2-I2V-A14B-Preview-Diffusers": (448, 832, 81, 16, LONG, True, 12),
    "FastVideo/CausalWan2.2-I2V-A14B-Preview-Diffusers": (448, 832, 81, 16, LONG, True, 12),
}


def test_presets_are_the_published_ones() -> None:
    presets = FEW_STEP_PRESETS | CAUSAL_PRESETS
    assert presets.keys() == PUBLISHED.keys()
    for name, params in presets.items():
        extra = params.extra or {}
        got = (params.height, params.width, params.num_frames, params.fps, extra["dmd_denoising_steps"])
        assert (*got, extra["warp_denoising_step"], params.flow_shift) == PUBLISHED[name], name
        assert params.num_inference_steps == len(extra["dmd_denoising_steps"])
        assert params.guidance_scale == 1.0


def test_the_teachers_scheduler_is_not_used(plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "fast"
    shutil.copytree(plain, path)
    file = path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": "UniPCMultistepScheduler", "flow_shift": 1.0}))
    pipeline = build_pipeline(resolve_model(str(path)), ExecutionArgs())
    assert pipeline.defaults().flow_shift == 8.0
    assert torch.equal(make(open_model(path)), make(open_model(plain)))
    assert "scheduler" not in pipeline.loaded_modules()
