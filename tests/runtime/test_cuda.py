"""The same path on a CUDA device (`make gpu`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kinetoscope import VideoGenerator
from lora_files import factors, tensors, write
from tiny import make_tiny_wan

SMALL: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 8, "guidance_scale": 4.0}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("cfg", ["sequential", "batched"])
def test_cuda_equals_cpu_in_float32(tmp_path: Path, cfg: str) -> None:
    path = make_tiny_wan(tmp_path)
    expected = VideoGenerator.from_pretrained(path, device="cpu").generate_video("a red cat", seed=5, **SMALL)
    result = VideoGenerator.from_pretrained(path, device="cuda", dtype="float32", cfg=cfg).generate_video(
        "a red cat", seed=5, **SMALL
    )
    assert (result.latents - expected.latents).abs().max() <= 1e-3 * expected.latents.std()


def test_bfloat16_on_cuda_stays_near(tmp_path: Path) -> None:
    path = make_tiny_wan(tmp_path)
    exact = VideoGenerator.from_pretrained(path, device="cpu").generate_video("a cat", **SMALL).latents
    got = VideoGenerator.from_pretrained(path, device="cuda").generate_video("a cat", **SMALL).latents
    assert (got - exact).norm() <= 0.05 * exact.norm()


@pytest.mark.parametrize("options", [{}, {"offload": "blocks"}, {"dtype": "bfloat16"}], ids=str)
def test_lora_on_cuda_comes_and_goes(tmp_path: Path, options: dict[str, Any]) -> None:
    path = make_tiny_wan(tmp_path / "model")
    file = write(tmp_path / "a.safetensors", tensors("kohya", factors(), 4.0))
    expected = VideoGenerator.from_pretrained(path, device="cpu", lora=file).generate_video("a cat", **SMALL).latents
    generator = VideoGenerator.from_pretrained(path, **{"device": "cuda", "dtype": "float32"} | options)
    base = generator.generate_video("a cat", **SMALL).latents
    generator.load_lora(file)
    got = generator.generate_video("a cat", **SMALL).latents
    assert (got - expected).norm() <= (0.05 if "dtype" in options else 1e-3) * expected.norm()
    generator.unload_lora("a")
    assert torch.equal(generator.generate_video("a cat", **SMALL).latents, base)


@pytest.mark.parametrize("kind", ["components", "blocks"])
def test_offload_changes_nothing(tmp_path: Path, kind: str) -> None:
    path = make_tiny_wan(tmp_path, layers=4)
    expected = VideoGenerator.from_pretrained(path, device="cuda", dtype="float32").generate_video("a cat", **SMALL)
    generator = VideoGenerator.from_pretrained(path, device="cuda", dtype="float32", offload=kind)
    for _ in range(2):
        result = generator.generate_video("a cat", **SMALL)
        assert torch.equal(result.latents, expected.latents) and (result.frames == expected.frames).all()
    for part in generator.pipeline.loaded_modules().values():
        assert not isinstance(part, torch.nn.Module) or not any(p.is_cuda for p in part.parameters())


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_blocks_agree(tmp_path: Path, mode: str) -> None:
    path = make_tiny_wan(tmp_path, layers=3)
    expected = VideoGenerator.from_pretrained(path, device="cuda", dtype="float32").generate_video("a cat", **SMALL)
    generator = VideoGenerator.from_pretrained(path, device="cuda", dtype="float32", compile=mode)
    generator.generate_video("a red circle moving left on black", **SMALL)
    result = generator.generate_video("a cat", **SMALL)
    assert (result.latents - expected.latents).abs().max() <= 1e-3 * expected.latents.std()


@pytest.mark.parametrize("kind", ["int8", "int8-dynamic", "fp8", "fp8-dynamic"])
def test_eight_bits_stay_near(tmp_path: Path, kind: str) -> None:
    """Alone, and with blocks that move."""
    path = make_tiny_wan(tmp_path)
    exact = VideoGenerator.from_pretrained(path, device="cuda").generate_video("a cat", **SMALL).latents
    plain, moving = (
        VideoGenerator.from_pretrained(path, device="cuda", quantize=kind, offload=offload)
        .generate_video("a cat", **SMALL)
        .latents
        for offload in (None, "blocks")
    )
    assert (plain - exact).norm() <= 0.2 * exact.norm()
    assert torch.equal(plain, moving)
