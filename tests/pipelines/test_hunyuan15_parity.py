"""HunyuanVideo 1.5's whole path against diffusers' pipelines, on the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kinetoscope.core.errors import InputError, ModelLoadError
from kinetoscope.core.types import ExecutionArgs, ForwardBatch, SamplingParams
from kinetoscope.loading import resolve_model
from kinetoscope.models.hunyuan15 import spec
from kinetoscope.pipelines.presets import build_pipeline
from kinetoscope.pipelines.presets.hunyuan15 import guider_params
from kinetoscope.pipelines.stages.hunyuan15 import quoted_text
from models.tiny_hunyuan15 import make_tiny_hunyuan15

PROMPTS = ['A red cat holds a sign "Hello", then “World”, then "Hello"', "a dog"]
NEGATIVE = ["", 'the letters "xyz"']
SEEDS = [3, 4]
STEPS = 4
SIZE = (48, 80)  # what the reference chooses for a 16:9 picture at the tiny target size


def our_run(pipeline: Any, frames: int, size: tuple[int, int], image: Any = None, **fields: Any) -> ForwardBatch:
    params = SamplingParams(height=size[0], width=size[1], num_frames=frames, num_inference_steps=STEPS, **fields)
    return pipeline.run(ForwardBatch(params.over(pipeline.defaults()), PROMPTS, NEGATIVE, SEEDS, image=image))


def oracle_run(oracle: Any, frames: int, **fields: Any) -> Any:
    return oracle(
        prompt=PROMPTS,
        negative_prompt=NEGATIVE,
        num_frames=frames,
        num_inference_steps=STEPS,
        generator=[torch.Generator("cpu").manual_seed(s) for s in SEEDS],
        output_type="latent",
        **fields,
    ).frames


def check_same(ours: ForwardBatch, oracle: Any, latents: torch.Tensor) -> None:
    assert ours.latents is not None
    assert (ours.latents - latents).abs().max() <= 1e-4 * latents.std()
    for frames, sample in zip(ours.frames, latents, strict=True):  # the reference's VAE decodes no batch
        with torch.no_grad():
            video = oracle.vae.decode(sample.unsqueeze(0) / oracle.vae.config.scaling_factor).sample
        video = oracle.video_processor.postprocess_video(video, output_type="np")[0]
        assert frames.shape == video.shape
        assert np.abs(frames - video * 255.0).max() <= 1.0


def open_both(path: Path, oracle_class: Any) -> tuple[Any, Any]:
    oracle = oracle_class.from_pretrained(path)
    oracle.set_progress_bar_config(disable=True)
    # Less padding than published, all of it masked: the reference computes it.
    oracle.tokenizer_max_length, oracle.tokenizer_2_max_length, oracle.vision_num_semantic_tokens = 520, 64, 5
    return build_pipeline(resolve_model(str(path)), ExecutionArgs()), oracle


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Our pipeline and diffusers', opened from one directory."""
    from diffusers import HunyuanVideo15Pipeline

    path = make_tiny_hunyuan15(tmp_path_factory.mktemp("hunyuan15"))
    return open_both(path, HunyuanVideo15Pipeline)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "meanflow"])
def image_pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The same for image-to-video."""
    from diffusers import HunyuanVideo15ImageToVideoPipeline

    path = make_tiny_hunyuan15(tmp_path_factory.mktemp("hunyuan15"), image=True, meanflow=request.param)
    return open_both(path, HunyuanVideo15ImageToVideoPipeline)


@pytest.mark.parametrize(("frames", "size"), [(5, (32, 48)), (9, (48, 32)), (1, (32, 32))])
def test_text_to_video(pair: tuple[Any, Any], frames: int, size: tuple[int, int]) -> None:
    ours, oracle = pair
    assert ours.defaults().guidance_scale == 6.0
    check_same(our_run(ours, frames, size), oracle, oracle_run(oracle, frames, height=size[0], width=size[1]))


@pytest.mark.parametrize("cfg", ["sequential", "batched"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_guidance(pair: tuple[Any, Any], cfg: str, scale: float) -> None:
    from diffusers import ClassifierFreeGuidance

    ours, oracle = pair
    ours.args = ExecutionArgs(cfg=cfg)
    before, oracle.guider = oracle.guider, ClassifierFreeGuidance(guidance_scale=scale)
    theirs = oracle_run(oracle, 5, height=32, width=48)
    oracle.guider = before
    batch = our_run(ours, 5, (32, 48), guidance_scale=scale)
    assert (batch.latents - theirs).abs().max() <= 1e-4 * theirs.std()


def test_image_to_video(image_pair: tuple[Any, Any]) -> None:
    """One picture for both prompts, as the reference has it."""
    ours, oracle = image_pair
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    tensor = (torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1).expand(2, -1, -1, -1)
    check_same(our_run(ours, 9, SIZE, tensor), oracle, oracle_run(oracle, 9, image=Image.fromarray(pixels)))


def test_an_image_is_needed(image_pair: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match="image"):
        our_run(image_pair[0], 5, (32, 32))


def test_text(pair: tuple[Any, Any]) -> None:
    ours, oracle = pair
    embeds, mask, glyphs, glyph_mask = oracle.encode_prompt(PROMPTS, batch_size=2)
    batch = our_run(ours, 1, (32, 32))
    assert batch.prompt_embeds is not None and batch.prompt_lengths is not None
    assert torch.equal(mask.sum(1), batch.prompt_lengths)
    assert batch.prompt_embeds.shape == (2, 1000, 24)
    assert (batch.prompt_embeds[:, :520] - embeds * mask.unsqueeze(-1)).abs().max() <= 1e-5
    family: Any = batch.family
    assert torch.equal(glyph_mask.sum(1), family.glyph_lengths)
    assert (family.glyphs[:, :64] - glyphs * glyph_mask.unsqueeze(-1)).abs().max() <= 1e-5


@pytest.mark.parametrize("prompt", [*PROMPTS, *NEGATIVE, '"" and "a"', '"a" “b” "a', "“”", '"a" "a"', "don't"])
def test_quoted_text(prompt: str) -> None:
    from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import extract_glyph_texts

    assert quoted_text(prompt) == extract_glyph_texts(prompt)


def test_a_long_prompt_is_refused(pair: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match="at most 1000"):
        pair[0].stages["text_encoding"].encode(["x" * 1100], torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"guidance_scale": 2.0}, 2.0),
        ({"guidance_scale": 2.0, "use_original_formulation": True}, 3.0),
        ({"enabled": False}, 1.0),
        ({"start": 0.1}, None),
        ({"stop": 0.5}, None),
    ],
)
def test_guider(pair: tuple[Any, Any], tmp_path: Path, change: dict[str, Any], expected: float | None) -> None:
    index = {"_class_name": "HunyuanVideo15Pipeline", "guider": ["diffusers", "ClassifierFreeGuidance"]}
    (tmp_path / "guider").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "guider" / "guider_config.json").write_text(json.dumps(change))
    model = resolve_model(str(tmp_path))
    if expected is None:
        with pytest.raises(ModelLoadError, match="all steps"):
            guider_params(model)
    else:
        assert guider_params(model).guidance_scale == expected


def test_presets() -> None:
    """HunyuanVideo-1.5 repository, "Optimal Inference Configurations"; sizes as the reference computes them."""
    table = {  # steps, guidance, shift
        "480p_t2v": (50, 6.0, 5.0),
        "480p_i2v": (50, 6.0, 5.0),
        "720p_t2v": (50, 6.0, 9.0),
        "720p_i2v": (50, 6.0, 7.0),
        "480p_t2v_distilled": (50, 1.0, 5.0),
        "480p_i2v_distilled": (50, 1.0, 5.0),
        "480p_i2v_step_distilled": (12, 1.0, 7.0),
        "720p_i2v_distilled": (50, 1.0, 7.0),
    }
    from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor

    sizes = HunyuanVideo15ImageProcessor(vae_scale_factor=16)
    prefix = "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-"
    assert {prefix + name for name in table} == spec.PRESETS.keys()
    for name, expected in table.items():
        p = spec.PRESETS[prefix + name]
        target = 960 if name.startswith("720p") else 640
        assert (p.height, p.width) == sizes.calculate_default_height_width(9, 16, target)
        assert (p.num_inference_steps, p.guidance_scale, p.flow_shift) == expected, name
        assert (p.num_frames, p.fps, p.scheduler) == (121, 24.0, "euler")
