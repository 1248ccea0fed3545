"""LTX-Video against diffusers' pipelines, on the same files: latents and frames, text- and image-to-video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kinetoscope import VideoGenerator
from kinetoscope.core.errors import InputError
from kinetoscope.core.types import ExecutionArgs, ForwardBatch, SamplingParams
from kinetoscope.loading import resolve_model
from kinetoscope.models.ltx import spec
from kinetoscope.models.ltx.strategy import start_schedule
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.pipelines.presets import build_pipeline
from models.tiny_ltx import make_tiny_ltx

PROMPT, NEGATIVE = "a red circle moving left on black", "a blue cat"
STEPS = 5
SIZES = [(9, 32, 64), (17, 64, 32), (1, 32, 32)]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "timed"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ComposedPipeline, Any]:
    """Ours and theirs, opened from one directory."""
    from diffusers import LTXPipeline

    path = make_tiny_ltx(tmp_path_factory.mktemp("ltx"), timed=request.param)
    oracle = LTXPipeline.from_pretrained(path)
    oracle.set_progress_bar_config(disable=True)
    return build_pipeline(resolve_model(str(path)), ExecutionArgs()), oracle


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "timed"])
def image_pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ComposedPipeline, Any]:
    """The same for image-to-video."""
    from diffusers import LTXImageToVideoPipeline

    path = make_tiny_ltx(tmp_path_factory.mktemp("ltx"), timed=request.param, image=True)
    oracle = LTXImageToVideoPipeline.from_pretrained(path)
    oracle.set_progress_bar_config(disable=True)
    return build_pipeline(resolve_model(str(path)), ExecutionArgs()), oracle


def arguments(size: tuple[int, int, int], guidance: float) -> dict[str, Any]:
    frames, height, width = size
    return {
        "num_frames": frames,
        "height": height,
        "width": width,
        "num_inference_steps": STEPS,
        "guidance_scale": guidance,
    }


def their_run(oracle: Any, output: str, seeds: list[int], fps: float, **more: Any) -> Any:
    torch.random.manual_seed(seeds[0])  # the VAE of the timed variant draws from the global generator
    generators = [torch.Generator("cpu").manual_seed(s) for s in seeds]
    video = oracle(
        prompt=[PROMPT] * len(seeds),
        negative_prompt=[NEGATIVE] * len(seeds),
        frame_rate=fps,
        generator=generators if len(seeds) > 1 else generators[0],
        output_type=output,
        **more,
    ).frames
    if output != "latent":
        return video
    size = oracle.transformer.config.in_channels, more["num_frames"], more["height"], more["width"]
    return unpack(video, *size)


def unpack(packed: Tensor, channels: int, frames: int, height: int, width: int) -> Tensor:
    return packed.transpose(1, 2).reshape(len(packed), channels, (frames - 1) // 4 + 1, height // 8, width // 8)


def our_run(
    pipeline: ComposedPipeline, seeds: list[int], fps: float, image: Tensor | None = None, **more: Any
) -> ForwardBatch:
    extra = {k: more.pop(k) for k in spec.EXTRA_DEFAULTS if k in more}
    params = SamplingParams(fps=fps, extra=extra, **more).over(pipeline.defaults())
    batch = ForwardBatch(params, [PROMPT] * len(seeds), [NEGATIVE] * len(seeds), seeds, image=image)
    return pipeline.run(batch)


def check(ours: Tensor | None, theirs: Tensor) -> None:
    assert ours is not None and ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.std()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("size", SIZES)
def test_text_to_video(pair: tuple[ComposedPipeline, Any], size: tuple[int, int, int], guidance: float) -> None:
    ours, oracle = pair
    given = arguments(size, guidance)
    timed = {"decode_timestep": 0.05, "decode_noise_scale": 0.025}
    batch = our_run(ours, [3], 24.0, **given, **timed)
    check(batch.latents, their_run(oracle, "latent", [3], 24.0, **given))
    video = their_run(oracle, "np", [3], 24.0, **given, **timed)[0]
    assert np.abs(batch.frames[0] - video * 255.0).max() <= 1.0


def test_the_frame_rate_matters(pair: tuple[ComposedPipeline, Any]) -> None:
    ours, oracle = pair
    given = arguments(SIZES[0], 3.0)
    slow = our_run(ours, [3], 8.0, **given).latents
    check(slow, their_run(oracle, "latent", [3], 8.0, **given))
    assert (slow - our_run(ours, [3], 24.0, **given).latents).abs().max() > 1e-3


@pytest.mark.parametrize("cfg", ["sequential", "batched"])
def test_a_batch_with_rescaled_guidance(pair: tuple[ComposedPipeline, Any], cfg: str) -> None:
    ours, oracle = pair
    given = arguments(SIZES[0], 3.0) | {"guidance_rescale": 0.7}
    ours.args = ExecutionArgs(cfg=cfg)
    check(our_run(ours, [1, 2], 25.0, **given).latents, their_run(oracle, "latent", [1, 2], 25.0, **given))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("size", SIZES[:2])
def test_image_to_video(image_pair: tuple[ComposedPipeline, Any], size: tuple[int, int, int], guidance: float) -> None:
    ours, oracle = image_pair
    given = arguments(size, guidance)
    image = 2 * torch.rand(1, 3, *size[1:], generator=torch.Generator().manual_seed(7)) - 1
    batch = our_run(ours, [3], 24.0, image, **given)
    check(batch.latents, their_run(oracle, "latent", [3], 24.0, image=(image + 1) / 2, **given))
    video = their_run(oracle, "np", [3], 24.0, image=(image + 1) / 2, **given)[0]
    assert np.abs(batch.frames[0] - video * 255.0).max() <= 1.0
    assert batch.condition is not None and torch.equal(batch.latents[:, :, :1], batch.condition)


def test_a_batch_of_images(image_pair: tuple[ComposedPipeline, Any]) -> None:
    ours, oracle = image_pair
    given = arguments(SIZES[0], 3.0)
    images = 2 * torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(8)) - 1
    batch = our_run(ours, [1, 2], 24.0, images, **given)
    check(batch.latents, their_run(oracle, "latent", [1, 2], 24.0, image=(images + 1) / 2, **given))


def test_prompt_embeddings(pair: tuple[ComposedPipeline, Any]) -> None:
    ours, oracle = pair
    prompts = [PROMPT, "a   cat", ""]
    theirs, mask, _, _ = oracle.encode_prompt(prompts, do_classifier_free_guidance=False)
    stage: Any = ours.stages["text_encoding"]
    embeds, lengths = stage.encode(prompts, torch.device("cpu"))
    torch.testing.assert_close(embeds, theirs, rtol=0, atol=1e-5)
    assert lengths.tolist() == mask.sum(1).tolist()


def test_a_given_shift_and_another_solver(pair: tuple[ComposedPipeline, Any]) -> None:
    """A shift of the user replaces the one by size; another solver takes the same shift."""
    scheduler = pair[0].get_module("scheduler")
    params = SamplingParams(num_inference_steps=4, flow_shift=5.0)
    assert start_schedule(scheduler, params, (1, 1, 1)).sigmas == start_schedule(scheduler, params, (9, 9, 9)).sigmas
    plain = SamplingParams(num_inference_steps=4)
    by_size = [start_schedule(scheduler, plain, size).sigmas for size in ((1, 4, 4), (4, 4, 4))]
    assert by_size[0][1] < by_size[1][1]
    params = SamplingParams(num_inference_steps=4, scheduler="unipc")
    assert len(start_schedule(scheduler, params, (1, 4, 4))) == 4


@pytest.mark.parametrize("value", [-0.1, 1.5, "0.1", True])
def test_bad_decoding(pair: tuple[ComposedPipeline, Any], value: Any) -> None:
    with pytest.raises(InputError, match="decode_timestep"):
        our_run(pair[0], [1], 25.0, **arguments(SIZES[2], 1.0), decode_timestep=value)


def test_one_step_is_no_schedule(pair: tuple[ComposedPipeline, Any]) -> None:
    """The published schedule stretches the noise levels between the first and the last: of one, diffusers makes NaN."""
    with pytest.raises(InputError, match="num_inference_steps=1 is too few"):
        our_run(pair[0], [1], 25.0, **arguments((1, 32, 32), 1.0) | {"num_inference_steps": 1})


def test_a_video_of_the_image_alone(pair: tuple[ComposedPipeline, Any]) -> None:
    with pytest.raises(InputError, match="num_frames=1 are the image alone; ask for 5"):
        our_run(pair[0], [1], 25.0, **arguments((1, 32, 32), 1.0), image=torch.zeros(1, 3, 32, 32))


PUBLISHED = {  # height, width, frames, fps, steps, guidance, decode_timestep, decode_noise_scale
    "Lightricks/LTX-Video": (480, 704, 161, 25.0, 50, 3.0, None, None),
    "Lightricks/LTX-Video-0.9.1": (512, 768, 161, 25.0, 50, 3.0, 0.03, 0.025),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets(name: str) -> None:
    p = spec.PRESETS[name]
    extra = p.extra or {}
    got = (p.height, p.width, p.num_frames, p.fps, p.num_inference_steps, p.guidance_scale)
    assert (*got, extra.get("decode_timestep"), extra.get("decode_noise_scale")) == PUBLISHED[name]
    assert set(spec.PRESETS) == set(PUBLISHED)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_cuda_equals_cpu(tmp_path: Path) -> None:
    path = make_tiny_ltx(tmp_path, timed=True)
    given: dict[str, Any] = {"height": 32, "width": 64, "num_frames": 9, "num_inference_steps": 4, "seed": 5}
    given["image"] = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    expected = VideoGenerator.from_pretrained(path, device="cpu").generate_video(PROMPT, **given)
    result = VideoGenerator.from_pretrained(path, device="cuda", dtype="float32").generate_video(PROMPT, **given)
    assert (result.latents - expected.latents).abs().max() <= 1e-3 * expected.latents.std()
