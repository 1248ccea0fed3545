"""Cosmos Predict 1, 2 and 2.5 against diffusers' pipelines, on the same files: text, latents and frames."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from kinetoscope import VideoGenerator
from kinetoscope.core.errors import InputError
from kinetoscope.core.types import ExecutionArgs, ForwardBatch, SamplingParams
from kinetoscope.loading import resolve_model
from kinetoscope.models.cosmos import spec
from kinetoscope.pipelines.catalogue import known_models
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.pipelines.presets import PIPELINES, build_pipeline
from models.tiny_cosmos import NoGuardrail, make_tiny_cosmos, without_torchvision

PROMPT, NEGATIVE = "a red circle moving left on black", "a blue cat"
STEPS = 5
HEIGHT, WIDTH = 32, 48
TEXT_1, VIDEO_1 = "CosmosTextToWorldPipeline", "CosmosVideoToWorldPipeline"
IMAGE_2, VIDEO_2 = "Cosmos2TextToImagePipeline", "Cosmos2VideoToWorldPipeline"
PREDICT_25 = "Cosmos2_5_PredictBasePipeline"


@pytest.fixture(scope="module", autouse=True)
def stand_ins() -> Iterator[None]:
    """diffusers' Cosmos modules call torchvision, which is not installed."""
    with without_torchvision():
        yield


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Kind -> (ours, theirs), opened from one directory; a kind that ends in # has a VAE without statistics."""
    import diffusers

    made: dict[str, tuple[ComposedPipeline, Any]] = {}

    def get(kind: str) -> tuple[ComposedPipeline, Any]:
        if kind not in made:
            name = kind.rstrip("#")
            path = make_tiny_cosmos(tmp_path_factory.mktemp("cosmos"), name, statistics=kind == name)
            oracle = getattr(diffusers, name).from_pretrained(path, safety_checker=NoGuardrail())
            oracle.set_progress_bar_config(disable=True)
            made[kind] = (build_pipeline(resolve_model(str(path)), ExecutionArgs()), oracle)
        return made[kind]

    return get


def pixels(frames: int, seed: int = 7, size: tuple[int, int] = (HEIGHT, WIDTH)) -> Tensor:
    """[T, 3, H, W] in [0, 1], as diffusers' pipelines take them."""
    return torch.rand(frames, 3, *size, generator=torch.Generator().manual_seed(seed))


def run(
    pair: tuple[ComposedPipeline, Any],
    guidance: float,
    frames: int,
    output: str = "latent",
    *,
    image: Tensor | None = None,
    video: Tensor | None = None,
    seeds: tuple[int, ...] = (3,),
    fps: int | None = None,
    extra: dict[str, Any] | None = None,
    **more: Any,
) -> tuple[ForwardBatch, Any]:
    """Ours and theirs. `image` [B, 3, H, W] and `video` [T, 3, H, W] in [0, 1]."""
    ours, oracle = pair
    common = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS, "guidance_scale": guidance}
    params = SamplingParams(**common, num_frames=frames, fps=fps, extra=extra, **more).over(ours.defaults())
    batch = ForwardBatch(params, [PROMPT] * len(seeds), [NEGATIVE] * len(seeds), list(seeds))
    batch.image = None if image is None else 2 * image - 1
    batch.video = None if video is None else 2 * video.transpose(0, 1).unsqueeze(0) - 1
    batch = ours.run(batch)
    generators = [torch.Generator("cpu").manual_seed(s) for s in seeds]
    given: dict[str, Any] = {**common, **(extra or {})}
    if fps is not None:
        given["fps"] = fps
    if type(oracle).__name__ != IMAGE_2:
        given["num_frames"] = frames
    if image is not None:
        given["image"] = image[0] if type(oracle).__name__ == PREDICT_25 else image
    if video is not None:
        given["video"] = video.unsqueeze(0)
    result = oracle(
        prompt=[PROMPT] * len(seeds),
        negative_prompt=[NEGATIVE] * len(seeds),
        generator=generators if len(seeds) > 1 else generators[0],
        output_type=output,
        **given,
    )
    return batch, result.images.unsqueeze(2) if type(oracle).__name__ == IMAGE_2 and output == "latent" else result[0]


def check(batch: ForwardBatch, theirs: Tensor) -> None:
    assert batch.latents is not None and batch.latents.shape == theirs.shape
    assert (batch.latents - theirs).abs().max() <= 1e-4 * theirs.std()


def check_frames(batch: ForwardBatch, theirs: Any) -> None:
    assert batch.frames[0].shape == theirs[0].shape == (theirs[0].shape[0], HEIGHT, WIDTH, 3)
    assert np.abs(batch.frames[0] - theirs[0] * 255.0).max() <= 1.0 + 1e-3


GUIDANCE = pytest.mark.parametrize("guidance", [1.0, 4.0])


@GUIDANCE
@pytest.mark.parametrize("frames", [1, 17])
def test_predict_1_text_to_world(pairs: Any, frames: int, guidance: float) -> None:
    check(*run(pairs(TEXT_1), guidance, frames, fps=30))


def test_predict_1_is_told_the_frame_rate(pairs: Any) -> None:
    slow, theirs = run(pairs(TEXT_1), 4.0, 17, fps=10)
    check(slow, theirs)
    fast, _ = run(pairs(TEXT_1), 4.0, 17, fps=30)
    assert (slow.latents - fast.latents).abs().max() > 1e-2 * theirs.std()


@pytest.mark.parametrize("kind", [TEXT_1, TEXT_1 + "#"])
def test_predict_1_frames(pairs: Any, kind: str) -> None:
    check_frames(*run(pairs(kind), 4.0, 17, "np", fps=30))


@GUIDANCE
@pytest.mark.parametrize("count", [0, 9, 20])
def test_predict_1_video_to_world(pairs: Any, count: int, guidance: float) -> None:
    """From an image (0), and from videos of two latent frames, and longer than the request."""
    given = {"image": pixels(1)} if count == 0 else {"video": pixels(count)}
    check(*run(pairs(VIDEO_1), guidance, 17, fps=30, **given))


@pytest.mark.parametrize("extra", [{"input_frames_guidance": True}, {"augment_sigma": 2.0}, {"augment_sigma": 0.0}])
def test_predict_1_options(pairs: Any, extra: dict[str, Any]) -> None:
    """At a sigma of 2 the last steps treat no frame as given."""
    check(*run(pairs(VIDEO_1), 4.0, 17, fps=30, video=pixels(9), extra=extra))


def test_predict_1_video_without_statistics(pairs: Any) -> None:
    check_frames(*run(pairs(VIDEO_1 + "#"), 4.0, 17, "np", fps=30, video=pixels(9)))


@GUIDANCE
def test_predict_2_text_to_image(pairs: Any, guidance: float) -> None:
    check(*run(pairs(IMAGE_2), guidance, 1))


def test_predict_2_image(pairs: Any) -> None:
    batch, theirs = run(pairs(IMAGE_2), 4.0, 1, "np")
    check_frames(batch, theirs[None])


@GUIDANCE
@pytest.mark.parametrize("count", [0, 7, 12])
def test_predict_2_video_to_world(pairs: Any, count: int, guidance: float) -> None:
    given = {"image": pixels(1)} if count == 0 else {"video": pixels(count)}
    batch, theirs = run(pairs(VIDEO_2), guidance, 9, fps=16, **given)
    check(batch, theirs)
    latent_frames = {0: 1, 7: 2, 12: 3}[count]  # 7 frames are a latent frame, another, and two left over
    assert batch.condition is not None and batch.condition.shape[2] == latent_frames
    kept = (batch.latents[:, :, :latent_frames] - batch.condition).abs().max()
    assert kept < 0.05, "given frames come back, up to the last noise level"


def test_predict_2_frames_and_options(pairs: Any) -> None:
    check_frames(*run(pairs(VIDEO_2), 4.0, 9, "np", fps=24, video=pixels(5)))
    check(*run(pairs(VIDEO_2), 4.0, 9, fps=16, video=pixels(5), extra={"sigma_conditioning": 0.5}))


@GUIDANCE
@pytest.mark.parametrize("given", ["text", "image", "video"])
def test_predict_25(pairs: Any, given: str, guidance: float) -> None:
    frames = {"text": {}, "image": {"image": pixels(1)}, "video": {"video": pixels(7)}}[given]
    check(*run(pairs(PREDICT_25), guidance, 9, **frames))


@pytest.mark.parametrize(
    "extra",
    [{"num_latent_conditional_frames": 1}, {"conditional_frame_timestep": -1.0}, {"conditional_frame_timestep": 0.1}],
)
def test_predict_25_options(pairs: Any, extra: dict[str, Any]) -> None:
    check(*run(pairs(PREDICT_25), 4.0, 9, video=pixels(7), extra=extra))


def test_predict_25_frames_and_image(pairs: Any) -> None:
    check_frames(*run(pairs(PREDICT_25), 4.0, 9, "np", image=pixels(1)))
    check(*run(pairs(PREDICT_25), 4.0, 1))


@pytest.mark.parametrize("cfg", ["sequential", "batched"])
@pytest.mark.parametrize("kind", [VIDEO_1, VIDEO_2])
def test_a_batch(pairs: Any, kind: str, cfg: str) -> None:
    """Two prompts with an image and a seed each; every generator is drawn from in the published order."""
    pair = pairs(kind)
    pair[0].args = ExecutionArgs(cfg=cfg)
    check(*run(pair, 4.0, 9, fps=16, image=pixels(2), seeds=(1, 2)))


def test_t5_embeddings(pairs: Any) -> None:
    ours, oracle = pairs(TEXT_1)
    prompts = [PROMPT, "  a   cat&amp;amp; circle ", "x" * 200, ""]
    theirs, _ = oracle.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=512)
    stage: Any = ours.stages["text_encoding"]
    embeds, lengths = stage.encode(prompts, torch.device("cpu"))
    torch.testing.assert_close(embeds, theirs, rtol=0, atol=1e-5)
    for row, length in zip(theirs, lengths.tolist(), strict=True):
        assert row[:length].abs().sum(1).min() > 0 and not row[length:].any()
    with pytest.raises(InputError, match="512"):
        stage.encode(["x" * 600], torch.device("cpu"))


def test_qwen_embeddings(pairs: Any) -> None:
    ours, oracle = pairs(PREDICT_25)
    prompts = [PROMPT, "A cat, and a dog."]
    theirs, _ = oracle.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=512)
    stage: Any = ours.stages["text_encoding"]
    torch.testing.assert_close(stage.encode(prompts, torch.device("cpu")), theirs, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="512"):
        stage.encode(["x" * 600], torch.device("cpu"))


def test_a_generator_with_a_picture(pairs: Any, tmp_path: Path) -> None:
    """From a picture file to a written video; a guardrail listed in the index, which has no folder, is not missed."""
    ours, oracle = pairs(VIDEO_2)
    path = Path(shutil.copytree(ours.model.path, tmp_path / "model"))
    index = json.loads((path / "model_index.json").read_text())
    index["safety_checker"] = ["cosmos_guardrail", "CosmosSafetyChecker"]
    (path / "model_index.json").write_text(json.dumps(index))
    picture = (255 * pixels(1)[0].permute(1, 2, 0)).round().to(torch.uint8).numpy()
    PIL.Image.fromarray(picture).save(tmp_path / "picture.png")
    generator = VideoGenerator.from_pretrained(path, device="cpu", dtype="float32")
    result = generator.generate_video(
        PROMPT,
        NEGATIVE,
        HEIGHT,
        WIDTH,
        9,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        seed=3,
        image=tmp_path / "picture.png",
        sigma_conditioning=0.001,
        output_path=tmp_path / "out.mp4",
    )
    theirs = oracle(
        image=PIL.Image.fromarray(picture),
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        height=HEIGHT,
        width=WIDTH,
        num_frames=9,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        fps=16,
        sigma_conditioning=0.001,
        generator=torch.Generator("cpu").manual_seed(3),
        output_type="latent",
    ).frames[0]
    assert (result.latents - theirs).abs().max() <= 1e-4 * theirs.std()
    assert (tmp_path / "out.mp4").stat().st_size > 0 and result.params.fps == 16


def test_two_runs_interleave(pairs: Any) -> None:
    """Each draws its own noise: interleaved runs give what each gives alone."""
    ours, _ = pairs(VIDEO_1)

    def batch(seed: int) -> ForwardBatch:
        params = SamplingParams(HEIGHT, WIDTH, 9, 30.0, 3, 4.0).over(ours.defaults())
        return ForwardBatch(params, [PROMPT], [NEGATIVE], [seed], image=2 * pixels(1, seed) - 1)

    alone = [ours.run(batch(seed)).latents for seed in (1, 2)]
    together = [batch(1), batch(2)]
    events = [ours.iterate(b) for b in together]
    while events:
        events = [e for e in events if next(e, None) is not None]
    for got, expected in zip(together, alone, strict=True):
        assert got.latents is not None and expected is not None and torch.equal(got.latents, expected)


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        (VIDEO_2, {}, "give one"),
        (VIDEO_2, {"image": (1, 32, 32)}, "this request needs"),
        (VIDEO_2, {"image": (1, HEIGHT, WIDTH), "video": (1, HEIGHT, WIDTH)}, "one or the other"),
        (VIDEO_2, {"image": (1, HEIGHT, WIDTH), "flow_shift": 3.0}, "no shift"),
        (VIDEO_1, {"image": (1, HEIGHT, WIDTH), "scheduler": "unipc"}, "'euler' only"),
        (VIDEO_1, {"image": (1, HEIGHT, WIDTH), "extra": {"augment_sigma": -1}}, "augment_sigma"),
        (PREDICT_25, {"video": (3, HEIGHT, WIDTH)}, "the video has 3"),
        (PREDICT_25, {"video": (9, HEIGHT, WIDTH), "num_frames": 1}, "num_frames is 1"),
        (PREDICT_25, {"video": (9, HEIGHT, WIDTH), "extra": {"num_latent_conditional_frames": 3}}, "1 or 2"),
        (PREDICT_25, {"video": (9, HEIGHT, WIDTH), "extra": {"num_latent_conditional_frames": 2.0}}, "1 or 2"),
        (PREDICT_25, {"extra": {"num_latent_conditional_frames": "2"}}, "1 or 2"),
        (VIDEO_1, {"image": (1, HEIGHT, WIDTH), "extra": {"input_frames_guidance": "no"}}, "neither true nor false"),
        (VIDEO_2, {"image": (1, HEIGHT, WIDTH), "num_frames": 1}, "the image alone"),
        (IMAGE_2, {"num_frames": 9}, "one frame"),
    ],
)
def test_refused_requests(pairs: Any, kind: str, change: dict[str, Any], words: str) -> None:
    ours, _ = pairs(kind)
    change = dict(change)
    given = {n: pixels(change[n][0], size=change.pop(n)[1:]) for n in ("image", "video") if n in change}
    params = SamplingParams(**{"height": HEIGHT, "width": WIDTH, "num_inference_steps": 2, "num_frames": 9} | change)
    if kind == IMAGE_2:
        assert params.num_frames == 9
    batch = ForwardBatch(params.over(ours.defaults()), [PROMPT], [NEGATIVE], [0], image=given.get("image"))
    batch.video = given["video"].transpose(0, 1).unsqueeze(0) if "video" in given else None
    with pytest.raises(InputError, match=words):
        ours.run(batch)


_PUBLISHED = {  # height, width, frames, fps, steps, guidance: diffusers' signatures; fps of 2.5: its example
    TEXT_1: (704, 1280, 121, 30.0, 36, 7.0),
    VIDEO_1: (704, 1280, 121, 30.0, 36, 7.0),
    IMAGE_2: (768, 1360, 1, 16.0, 35, 7.0),
    VIDEO_2: (704, 1280, 93, 16.0, 35, 7.0),
    PREDICT_25: (704, 1280, 93, 16.0, 36, 7.0),
}
MODELS = {
    "nvidia/Cosmos-1.0-Diffusion-7B-Text2World": TEXT_1,
    "nvidia/Cosmos-1.0-Diffusion-14B-Text2World": TEXT_1,
    "nvidia/Cosmos-1.0-Diffusion-7B-Video2World": VIDEO_1,
    "nvidia/Cosmos-1.0-Diffusion-14B-Video2World": VIDEO_1,
    "nvidia/Cosmos-Predict2-2B-Text2Image": IMAGE_2,
    "nvidia/Cosmos-Predict2-14B-Text2Image": IMAGE_2,
    "nvidia/Cosmos-Predict2-2B-Video2World": VIDEO_2,
    "nvidia/Cosmos-Predict2-14B-Video2World": VIDEO_2,
    "nvidia/Cosmos-Predict2.5-2B": PREDICT_25,
    "nvidia/Cosmos-Predict2.5-14B": PREDICT_25,
}


@pytest.mark.parametrize("name", MODELS)
def test_presets(pairs: Any, name: str) -> None:
    import inspect

    p = spec.PRESETS[name]
    got = (p.height, p.width, p.num_frames, p.fps, p.num_inference_steps, p.guidance_scale)
    assert got == _PUBLISHED[MODELS[name]]
    ours, oracle = pairs(MODELS[name])
    signature = {k: v.default for k, v in inspect.signature(oracle.__call__).parameters.items()}
    for field in ("height", "width", "num_frames", "fps", "num_inference_steps", "guidance_scale"):
        assert getattr(p, field) == signature.get(field, getattr(p, field)), field
    assert {k: signature[k] for k in ours.extra_defaults} == dict(ours.extra_defaults)
    assert p.negative_prompt == inspect.getmodule(type(oracle)).DEFAULT_NEGATIVE_PROMPT
    assert set(spec.PRESETS) == set(MODELS)
    known = {m.name: m.tasks for m in known_models()}
    assert PIPELINES[MODELS[name]] is type(ours) and known[name] == ours.tasks


@pytest.mark.parametrize("name", ["nvidia/Cosmos-1.0-Diffusion-14B-Video2World", "nvidia/Cosmos-Predict2.5-2B"])
def test_published_sizes_are_served(pairs: Any, name: str) -> None:
    """The default request of the full-size configuration divides into tokens that its positions cover."""
    ours, _ = pairs(MODELS[name])
    ours.geometry.check(ours.defaults())
    p = spec.PRESETS[name]
    tokens = ours.geometry.tokens(p.num_frames or 0, p.height or 0, p.width or 0)
    assert tokens == (16 if MODELS[name] == VIDEO_1 else 24) * 44 * 80
    large = spec.CosmosConfig(num_attention_heads=40, num_layers=36)
    linear = 2 * tokens * 14e9  # a multiply-add a parameter and token, and attention beside it
    assert 0.8 * linear < spec.forward_flops(large, tokens) - 8 * 36 * tokens**2 * 5120 / 2 < 1.2 * linear
