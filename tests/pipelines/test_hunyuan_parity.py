"""HunyuanVideo's whole path against diffusers' pipelines, on the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kinetoscope import VideoGenerator
from kinetoscope.core.errors import InputError
from kinetoscope.core.types import ExecutionArgs, ForwardBatch, SamplingParams
from kinetoscope.loading import resolve_model
from kinetoscope.models.hunyuan import spec
from kinetoscope.pipelines.presets import build_pipeline
from models.tiny_hunyuan import make_tiny_hunyuan, make_tiny_hunyuan_i2v

PROMPTS = ["A red cat walks on the grass", "a dog"]
NEGATIVE = ["bad", "an ugly thing, blurred"]
SEEDS = [3, 4]
STEPS = 4


def our_run(pipeline: Any, size: tuple[int, int, int], **fields: Any) -> ForwardBatch:
    frames, height, width = size
    given = {k: fields.pop(k) for k in ("image", "last_image") if k in fields}
    params = SamplingParams(height=height, width=width, num_frames=frames, num_inference_steps=STEPS, **fields)
    return pipeline.run(ForwardBatch(params.over(pipeline.defaults()), PROMPTS, NEGATIVE, SEEDS, **given))


def oracle_run(oracle: Any, output: str, size: tuple[int, int, int], **fields: Any) -> Any:
    frames, height, width = size
    return oracle(
        prompt=PROMPTS,
        negative_prompt=NEGATIVE,
        num_frames=frames,
        height=height,
        width=width,
        num_inference_steps=STEPS,
        generator=[torch.Generator("cpu").manual_seed(s) for s in SEEDS],
        output_type=output,
        **fields,
    ).frames


def check_same(ours: ForwardBatch, latents: torch.Tensor, video: np.ndarray[Any, Any]) -> None:
    assert ours.latents is not None
    assert (ours.latents - latents).abs().max() <= 1e-4 * latents.std()
    frames = np.stack(ours.frames)
    assert frames.shape == video.shape
    assert np.abs(frames - video * 255.0).max() <= 1.0


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Our pipeline and diffusers', opened from one directory."""
    from diffusers import HunyuanVideoPipeline

    path = make_tiny_hunyuan(tmp_path_factory.mktemp("hunyuan"))
    oracle = HunyuanVideoPipeline.from_pretrained(path)
    oracle.set_progress_bar_config(disable=True)
    return build_pipeline(resolve_model(str(path)), ExecutionArgs()), oracle


@pytest.mark.parametrize("true_cfg_scale", [1.0, 4.0])
@pytest.mark.parametrize("size", [(5, 32, 48), (9, 48, 32), (1, 32, 32)])
def test_text_to_video(pair: tuple[Any, Any], size: tuple[int, int, int], true_cfg_scale: float) -> None:
    ours, oracle = pair
    more = {"guidance_scale": 6.0, "true_cfg_scale": true_cfg_scale}
    latents = oracle_run(oracle, "latent", size, **more)
    with torch.no_grad():
        video = oracle.vae.decode(latents / oracle.vae.config.scaling_factor).sample
    video = oracle.video_processor.postprocess_video(video, output_type="np")
    check_same(our_run(ours, size, extra={"true_cfg_scale": true_cfg_scale}), latents, video)


@pytest.mark.parametrize("cfg", ["sequential", "batched"])
def test_rows_together_or_alone(pair: tuple[Any, Any], cfg: str) -> None:
    ours, oracle = pair
    ours.args = ExecutionArgs(cfg=cfg)
    theirs = oracle_run(oracle, "latent", (5, 32, 32), guidance_scale=3.0, true_cfg_scale=2.0)
    batch = our_run(ours, (5, 32, 32), guidance_scale=3.0, extra={"true_cfg_scale": 2.0})
    assert (batch.latents - theirs).abs().max() <= 1e-4 * theirs.std()


def test_the_embedded_guidance_matters(pair: tuple[Any, Any]) -> None:
    ours, oracle = pair
    theirs = oracle_run(oracle, "latent", (5, 32, 32), guidance_scale=6.0)
    other = our_run(ours, (5, 32, 32), guidance_scale=1.0).latents
    assert other is not None and (other - theirs).abs().max() > 1e-3 * theirs.std()


def test_text(pair: tuple[Any, Any]) -> None:
    ours, oracle = pair
    embeds, pooled, mask = oracle.encode_prompt(PROMPTS)
    batch = our_run(ours, (1, 32, 32))
    assert batch.prompt_embeds is not None and batch.prompt_lengths is not None
    assert torch.equal(mask.sum(1), batch.prompt_lengths)
    assert batch.prompt_embeds.shape == embeds.shape
    assert (batch.prompt_embeds - embeds * mask.unsqueeze(-1)).abs().max() <= 1e-5
    family: Any = batch.family
    assert (family.pooled - pooled).abs().max() <= 1e-5


def test_a_long_prompt_is_refused(pair: tuple[Any, Any]) -> None:
    stage = pair[0].stages["text_encoding"]
    with pytest.raises(InputError, match="at most 256"):
        stage.encode(["x" * 300], torch.device("cpu"))


@pytest.mark.parametrize("value", [0.5, 1000.0, "6", True, float("nan")])
def test_bad_true_cfg_scale(pair: tuple[Any, Any], value: Any) -> None:
    with pytest.raises(InputError, match="true_cfg_scale"):
        our_run(pair[0], (1, 32, 32), extra={"true_cfg_scale": value})


def test_damaged_text_parts_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from kinetoscope.core.errors import ModelLoadError

    path = make_tiny_hunyuan(tmp_path)
    file, key = path / "text_encoder_2" / "model.safetensors", "text_model.final_layer_norm.weight"
    tensors = load_file(file)
    key = next(k for k in tensors if key.endswith(k))
    for value, words in (
        (torch.ones(3), r"final_layer_norm.weight is \(3,\), needs"),
        (tensors[key] / 0, "not finite"),
    ):
        save_file(tensors | {key: value}, file, {"format": "pt"})
        with pytest.raises(ModelLoadError, match=words):
            build_pipeline(resolve_model(str(path)), ExecutionArgs()).get_module("text_encoder_2")
    (path / "tokenizer_2" / "tokenizer_config.json").unlink()
    with pytest.raises(ModelLoadError, match=r"no tokenizer_config\.json"):
        build_pipeline(resolve_model(str(path)), ExecutionArgs()).get_module("tokenizer_2")


def test_parts_of_another_kind_are_refused(tmp_path: Path) -> None:
    """A tokenizer or processor whose own file does not say what model_index.json says; fast and slow are the same."""
    from kinetoscope.core.errors import ModelLoadError

    path = make_tiny_hunyuan_i2v(tmp_path, "token_replace")
    index = path / "model_index.json"
    values = json.loads(index.read_text())
    index.write_text(json.dumps({**values, "tokenizer": ["transformers", "LlamaTokenizerFast"]}))
    assert build_pipeline(resolve_model(str(path)), ExecutionArgs()).get_module("tokenizer")
    index.write_text(json.dumps({**values, "tokenizer": ["transformers", "CLIPTokenizer"]}))
    processor = path / "image_processor" / "preprocessor_config.json"
    other = {**json.loads(processor.read_text()), "image_processor_type": "SiglipImageProcessor"}
    processor.write_text(json.dumps(other))
    pipeline = build_pipeline(resolve_model(str(path)), ExecutionArgs())
    for name, words in (("tokenizer", "is of a LlamaTokenizer, .* is a CLIPTokenizer"), ("image_processor", "Siglip")):
        with pytest.raises(ModelLoadError, match=words):
            pipeline.get_module(name)


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from kinetoscope.core.errors import ModelLoadError

    path = make_tiny_hunyuan(tmp_path)
    file = path / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("norm.weight")
    save_file(tensors, file, {"format": "pt"})
    pipeline = build_pipeline(resolve_model(str(path)), ExecutionArgs())
    with pytest.raises(ModelLoadError, match=r"norm\.weight"):
        pipeline.get_module("text_encoder")


@pytest.fixture(scope="module", params=["token_replace", "latent_concat"])
def image_pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Image-to-video, our pipeline and diffusers', opened from one directory."""
    from diffusers import HunyuanVideoImageToVideoPipeline

    path = make_tiny_hunyuan_i2v(tmp_path_factory.mktemp("hunyuan"), request.param)
    oracle = HunyuanVideoImageToVideoPipeline.from_pretrained(path)
    oracle.set_progress_bar_config(disable=True)
    return build_pipeline(resolve_model(str(path)), ExecutionArgs()), oracle


def pictures(count: int, height: int, width: int) -> tuple[list[Image.Image], torch.Tensor]:
    """Random pictures, and the same as a batch holds them."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return [Image.fromarray(p) for p in pixels], tensor


@pytest.mark.parametrize("size", [(9, 32, 48)])
def test_image_to_video(image_pair: tuple[Any, Any], size: tuple[int, int, int]) -> None:
    ours, oracle = image_pair
    images, tensor = pictures(2, *size[1:])
    latents, video = (oracle_run(oracle, output, size, image=images, guidance_scale=6.0) for output in ("latent", "np"))
    check_same(our_run(ours, size, image=tensor), latents, video)


@pytest.mark.parametrize("cfg", ["sequential", "batched"])
def test_image_to_video_with_guidance(image_pair: tuple[Any, Any], cfg: str) -> None:
    """One sample: the reference makes one black picture whatever the number of prompts."""
    ours, oracle = image_pair
    ours.args = ExecutionArgs(cfg=cfg)
    images, tensor = pictures(1, 32, 48)
    theirs = oracle(
        image=images[0],
        prompt=PROMPTS[0],
        negative_prompt=NEGATIVE[0],
        height=32,
        width=48,
        num_frames=9,
        num_inference_steps=STEPS,
        guidance_scale=6.0,
        true_cfg_scale=3.0,
        generator=torch.Generator("cpu").manual_seed(7),
        output_type="latent",
    ).frames
    params = SamplingParams(
        height=32, width=48, num_frames=9, num_inference_steps=STEPS, extra={"true_cfg_scale": 3.0}
    ).over(ours.defaults())
    batch = ours.run(ForwardBatch(params, PROMPTS[:1], NEGATIVE[:1], [7], image=tensor))
    assert (batch.latents - theirs).abs().max() <= 1e-4 * theirs.std()


def test_an_image_is_needed(image_pair: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match="image"):
        our_run(image_pair[0], (5, 32, 32))


def test_a_prompt_with_the_mark_of_an_image(image_pair: tuple[Any, Any]) -> None:
    params = SamplingParams(height=32, width=32, num_frames=5, num_inference_steps=1).over(image_pair[0].defaults())
    with pytest.raises(InputError, match="stands for the image"):
        image_pair[0].run(ForwardBatch(params, ["a <image> b"], [""], [0], image=torch.zeros(1, 3, 32, 32)))


def test_a_video_of_the_image_alone(image_pair: tuple[Any, Any]) -> None:
    """By "latent_concat" the image is left out of the video, else it is its first frame: nothing would be made."""
    with pytest.raises(InputError, match="ask for 5 or more"):
        our_run(image_pair[0], (1, 32, 32), image=torch.zeros(2, 3, 32, 32))


def test_guidance_that_the_network_is_not_told(image_pair: tuple[Any, Any]) -> None:
    ours = image_pair[0]
    told = ours.config.guidance_embeds
    assert ours.defaults().guidance_scale == (6.0 if told else 1.0)
    if not told:
        with pytest.raises(InputError, match=r"guidance_scale=6\.0: this network is not told it"):
            our_run(ours, (5, 32, 32), image=torch.zeros(2, 3, 32, 32), guidance_scale=6.0)


def test_presets() -> None:
    """Model cards and published scheduler configurations; see `spec.PRESETS`."""
    table = {
        "hunyuanvideo-community/HunyuanVideo": (720, 1280, 129, 24.0, 50, 6.0, 7.0),
        "FastVideo/FastHunyuan-diffusers": (720, 1280, 125, 24.0, 6, 6.0, 17.0),
        "hunyuanvideo-community/HunyuanVideo-I2V": (720, 1280, 129, 24.0, 50, 6.0, 7.0),
        "hunyuanvideo-community/HunyuanVideo-I2V-33ch": (720, 1280, 129, 24.0, 50, 1.0, 7.0),
    }
    assert table.keys() == spec.PRESETS.keys()
    for name, p in spec.PRESETS.items():
        got = (p.height, p.width, p.num_frames, p.fps, p.num_inference_steps, p.guidance_scale, p.flow_shift)
        assert got == table[name], name
        assert p.scheduler == "euler"


def test_through_the_generator(image_pair: tuple[Any, Any]) -> None:
    """A request by name of fields gives what the batch above gives."""
    ours, _ = image_pair
    images, tensor = pictures(2, 32, 48)
    generator = VideoGenerator.from_pretrained(ours.model, device="cpu", dtype="float32")
    results = generator.generate_video(
        PROMPTS,
        NEGATIVE,
        32,
        48,
        9,
        num_inference_steps=STEPS,
        seed=SEEDS,
        image=images,
        true_cfg_scale=2.0,
    )
    expected = our_run(ours, (9, 32, 48), image=tensor, extra={"true_cfg_scale": 2.0})
    assert expected.latents is not None
    for result, latents, frames in zip(results, expected.latents, expected.frames, strict=True):
        assert (result.latents - latents).abs().max() <= 1e-4 * latents.std()
        assert result.frames.shape == frames.shape
