"""SkyReels-V2 against diffusers' pipelines, on the same files: plain and diffusion forcing, short and long."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from kinetoscope import VideoGenerator
from kinetoscope.core.errors import InputError
from kinetoscope.core.types import ExecutionArgs, ForwardBatch, SamplingParams
from kinetoscope.loading import resolve_model
from kinetoscope.models.skyreels import spec
from kinetoscope.models.skyreels.forcing import frames_timesteps, moving_frames, plan_forcing, step_matrix
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.pipelines.presets import build_pipeline
from models.tiny_skyreels import make_tiny_skyreels

PROMPT, NEGATIVE = "a red circle moving left on black", "a blue cat"
STEPS = 4
HEIGHT, WIDTH = 32, 48
TEXT, IMAGE = "SkyReelsV2Pipeline", "SkyReelsV2ImageToVideoPipeline"
FORCING, FORCING_IMAGE = "SkyReelsV2DiffusionForcingPipeline", "SkyReelsV2DiffusionForcingImageToVideoPipeline"
FORCING_VIDEO = "SkyReelsV2DiffusionForcingVideoToVideoPipeline"
Pair = tuple[ComposedPipeline, Any]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    """Ours and theirs of a pipeline class, opened from one directory."""
    opened: dict[Any, Pair] = {}

    def open_pair(name: str, **variant: Any) -> Pair:
        import diffusers

        key = (name, *variant.items())
        if key not in opened:
            path = make_tiny_skyreels(tmp_path_factory.mktemp("skyreels"), name, **variant)
            oracle = getattr(diffusers, name).from_pretrained(path)
            oracle.set_progress_bar_config(disable=True)
            opened[key] = build_pipeline(resolve_model(str(path)), ExecutionArgs()), oracle
        return opened[key]

    return open_pair


def picture(seed: int) -> Image.Image:
    """Smooth random colours at the size of the request."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def as_tensor(image: Image.Image, rows: int = 1) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(127.5).sub(1).repeat(rows, 1, 1, 1)


def their_run(oracle: Any, frames: int, guidance: float, seeds: list[int], output: str = "latent", **more: Any) -> Any:
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    if oracle.transformer.config.num_frame_per_block != 1:
        oracle.transformer._set_ar_attention(1)  # the oracle remembers the block size of the last call
    return oracle(
        prompt=[PROMPT] * len(seeds) if len(seeds) > 1 else PROMPT,
        negative_prompt=[NEGATIVE] * len(seeds) if len(seeds) > 1 else NEGATIVE,
        height=HEIGHT,
        width=WIDTH,
        num_frames=frames,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        generator=generators if len(seeds) > 1 else generators[0],
        output_type=output,
        **more,
    ).frames


def our_run(pipeline: ComposedPipeline, frames: int, guidance: float, seeds: list[int], **more: Any) -> ForwardBatch:
    images = {k: as_tensor(more.pop(k), len(seeds)) for k in ("image", "last_image") if k in more}
    images |= {"video": more.pop("video")} if "video" in more else {}
    fps = float(more.pop("fps", 24))
    decode = more.pop("decode", False)
    params = SamplingParams(
        height=HEIGHT,
        width=WIDTH,
        num_frames=frames,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        flow_shift=3.0,
        fps=fps,
        extra=more,
    ).over(pipeline.defaults())
    batch = ForwardBatch(params, [PROMPT] * len(seeds), [NEGATIVE] * len(seeds), seeds, **images)
    decoding = pipeline.stages.pop("decoding")
    try:
        batch = pipeline.run(batch)
    finally:
        pipeline.add_stage("decoding", decoding)
    return decoding.forward(batch, pipeline.args) if decode else batch


def check(ours: Tensor | None, theirs: Tensor) -> None:
    assert ours is not None and ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.std()


@pytest.mark.parametrize("guidance", [1.0, 6.0])
@pytest.mark.parametrize("frames", [1, 9])
def test_text_to_video(pair: Callable[..., Pair], frames: int, guidance: float) -> None:
    ours, oracle = pair(TEXT)
    batch = our_run(ours, frames, guidance, [1, 2], decode=True)
    check(batch.latents, their_run(oracle, frames, guidance, [1, 2]))
    video = their_run(oracle, frames, guidance, [1, 2], "np")
    assert np.abs(batch.frames[1] - video[1] * 255.0).max() <= 1.0


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("last", [False, True])
def test_image_to_video(pair: Callable[..., Pair], last: bool, guidance: float) -> None:
    ours, oracle = pair(IMAGE, last=last)
    images = {"image": picture(0)} | ({"last_image": picture(1)} if last else {})
    check(our_run(ours, 9, guidance, [3], **images).latents, their_run(oracle, 9, guidance, [3], **images))


FORCINGS = {
    "together": {},
    "slow film": {"fps": 16},
    "causal blocks": {"causal_block_size": 2},
    "one after another": {"ar_step": 2, "causal_block_size": 1},
    "blocks one after another": {"ar_step": 2, "causal_block_size": 2},
    "far apart": {"ar_step": STEPS + 3, "causal_block_size": 2},
}


@pytest.mark.parametrize("guidance", [1.0, 6.0])
@pytest.mark.parametrize("name", FORCINGS)
def test_forcing(pair: Callable[..., Pair], name: str, guidance: float) -> None:
    ours, oracle = pair(FORCING)
    more = FORCINGS[name]
    batch = our_run(ours, 13, guidance, [3], **more)
    check(batch.latents, their_run(oracle, 13, guidance, [3], **more))


LONG = {  # parameters, then the frames of the video
    "together": ({"base_num_frames": 13, "overlap_history": 5}, 29),
    "a short last window": ({"base_num_frames": 13, "overlap_history": 5}, 25),
    "blocks one after another": (
        {"base_num_frames": 13, "overlap_history": 5, "ar_step": 2, "causal_block_size": 2},
        29,
    ),
    "overlap cut to blocks": ({"base_num_frames": 13, "overlap_history": 9, "causal_block_size": 2}, 17),
}


@pytest.mark.parametrize("noised", [0, 20])
@pytest.mark.parametrize("name", LONG)
def test_long_video(pair: Callable[..., Pair], name: str, noised: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle noises frames taken over from torch's global generator; here it draws from the request's."""
    ours, oracle = pair(FORCING)
    given, frames = LONG[name]
    more = given | {"addnoise_condition": noised}
    if noised:
        share_generator(monkeypatch, 3)
    check(our_run(ours, frames, 6.0, [3], **more).latents, their_run(oracle, frames, 6.0, [3], **more))


def share_generator(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Let `torch.randn_like` draw from the generator that is seeded with `seed` next."""
    made: list[torch.Generator] = []
    seeded = torch.Generator.manual_seed

    class Recorded(torch.Generator):
        def manual_seed(self, value: int) -> Any:
            made.append(self)
            return seeded(self, value)

    monkeypatch.setattr(torch, "Generator", Recorded)
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.randn(x.shape, generator=made[-1]))


IMAGES = {
    "together": ({}, 9),
    "one after another": ({"ar_step": 2, "causal_block_size": 1}, 9),
    "blocks": ({"causal_block_size": 2, "ar_step": 1}, 13),
    "long": ({"base_num_frames": 13, "overlap_history": 5}, 29),
}


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("name", IMAGES)
def test_forcing_from_an_image(pair: Callable[..., Pair], name: str, guidance: float) -> None:
    ours, oracle = pair(FORCING_IMAGE)
    more, frames = IMAGES[name]
    more = more | {"image": picture(0)}
    check(our_run(ours, frames, guidance, [3], **more).latents, their_run(oracle, frames, guidance, [3], **more))


@pytest.mark.parametrize("more", [{}, {"ar_step": 1, "causal_block_size": 1}, {"causal_block_size": 2}])
def test_forcing_between_two_images(pair: Callable[..., Pair], more: dict[str, Any]) -> None:
    """The oracle's latents have the last image behind them; its decoded video has not."""
    ours, oracle = pair(FORCING_IMAGE)
    given = more | {"image": picture(0), "last_image": picture(1)}
    batch = our_run(ours, 9, 5.0, [3], decode=True, **given)
    check(batch.latents, their_run(oracle, 9, 5.0, [3], **given)[:, :, :-1])
    video = their_run(oracle, 9, 5.0, [3], "np", **given)[0]
    assert np.abs(batch.frames[0] - video * 255.0).max() <= 1.0


CONTINUED = {
    "one window": ({"overlap_history": 5, "base_num_frames": 13}, 13),
    "two windows": ({"overlap_history": 5, "base_num_frames": 13}, 21),
    "blocks one after another": (
        {"overlap_history": 9, "base_num_frames": 13, "ar_step": 1, "causal_block_size": 2},
        17,
    ),
}


@pytest.mark.parametrize("name", CONTINUED)
def test_forcing_continues_a_video(pair: Callable[..., Pair], name: str) -> None:
    ours, oracle = pair(FORCING_VIDEO)
    more, frames = CONTINUED[name]
    video = [picture(i) for i in range(11)]
    tensor = torch.stack([as_tensor(p)[0] for p in video], dim=1).unsqueeze(0)
    theirs = their_run(oracle, frames, 5.0, [3], video=video, **more)
    check(our_run(ours, frames, 5.0, [3], video=tensor, **more).latents, theirs)


def test_a_batch_is_its_samples(pair: Callable[..., Pair]) -> None:
    """The oracle cannot: its frame-rate embedding does not broadcast over a batch."""
    ours, _ = pair(FORCING)
    more = {"ar_step": 2, "causal_block_size": 2}
    both = our_run(ours, 13, 6.0, [1, 2], **more).latents
    for row, seed in enumerate((1, 2)):
        alone = our_run(ours, 13, 6.0, [seed], **more).latents
        check(both[row : row + 1], alone)


@torch.no_grad()
def test_interleaved_runs_are_the_runs_alone(pair: Callable[..., Pair]) -> None:
    """Two long videos on one pipeline, a step of one after a step of the other."""
    ours, _ = pair(FORCING)
    more = {"base_num_frames": 13, "overlap_history": 5, "addnoise_condition": 20, "ar_step": 1, "causal_block_size": 1}
    alone = [our_run(ours, 21, 6.0, [seed], **more) for seed in (1, 2)]
    stage: Any = ours.stages["denoising"]
    states = []
    for done in alone:
        batch = ForwardBatch(done.params, done.prompts, done.negative_prompts, done.seeds)
        for name in ("validation", "text_encoding", "timesteps", "latents"):
            batch = ours.stages[name].forward(batch, ours.args)
        engine = stage.engine(batch)
        state = engine.strategy.prepare(batch, ours.args)
        states.append((engine, state, engine.iterate(state)))
    for _ in itertools.zip_longest(*(events for _, _, events in states)):
        pass
    for (engine, state, _), done in zip(states, alone, strict=True):
        assert torch.equal(engine.strategy.postprocess(state).latents, done.latents)


def test_the_published_processor_loads(tmp_path: Path) -> None:
    """Published directories name the whole CLIP processor, of which the image half is used."""
    path = make_tiny_skyreels(tmp_path, IMAGE)
    index = path / "model_index.json"
    index.write_text(index.read_text().replace("CLIPImageProcessorPil", "CLIPProcessor"))
    ours = build_pipeline(resolve_model(str(path)), ExecutionArgs())
    pixels = ours.get_module("image_processor")(images=[picture(0)], return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 8, 8)


def test_an_image_matters(pair: Callable[..., Pair]) -> None:
    """The comparisons above can fail: another image is far outside their tolerance."""
    ours, _ = pair(FORCING_IMAGE)
    first, second = (our_run(ours, 9, 5.0, [3], image=picture(i)).latents for i in (0, 1))
    assert (first - second)[:, :, 1:].abs().max() > 1e-2 * first.std()


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("ar_step", [0, 1, 4, 30])
@pytest.mark.parametrize("ready", [0, 1, 2])
def test_step_matrix(pair: Callable[..., Pair], ready: int, ar_step: int, block: int) -> None:
    _, oracle = pair(FORCING)
    template = torch.tensor([999, 800, 600, 300, 100])
    told, taken, moving, _ = oracle.generate_timestep_matrix(6, template, 6, ar_step, ready, block)
    matrix = step_matrix(6, len(template), ready=ready, block=block, ar_step=ar_step)
    assert torch.equal(matrix, taken)
    assert torch.equal(moving_frames(matrix, len(template)), moving)
    assert torch.equal(frames_timesteps(matrix, template.tolist()), told)


def test_the_published_example_of_a_schedule() -> None:
    """diffusers' SkyReels-V2 page: 25 latent frames in blocks of 5, 30 steps, lag 5: 50 iterations."""
    matrix = step_matrix(25, 30, block=5, ar_step=5)
    assert matrix.shape == (50, 25)
    assert matrix[5, ::5].tolist() == [6, 1, 0, 0, 0]


def test_windows() -> None:
    """diffusers' SkyReels-V2 page: 257 frames in windows of 97 that overlap by 17 are three windows."""
    plan = plan_forcing({"overlap_history": 17, "causal_block_size": 5}, 257, temporal=4, default_block=1)
    assert (plan.windows, plan.overlap, plan.block) == ((25, 25, 25), 5, 5)
    assert plan_forcing(None, 97, temporal=4, default_block=1).windows == (25,)
    for frames in range(97, 400, 4):
        plan = plan_forcing({"overlap_history": 17}, frames, temporal=4, default_block=1)
        assert plan.windows[0] + sum(w - 5 for w in plan.windows[1:]) == (frames - 1) // 4 + 1
        assert len(plan.windows) == 1 + math.ceil(((frames - 1) // 4 + 1 - 25) / 20)


@pytest.mark.parametrize(
    ("extra", "frames", "words"),
    [
        ({}, 101, "overlap_history"),
        ({"overlap_history": 97}, 101, "overlap_history"),
        ({"base_num_frames": 96, "overlap_history": 94}, 101, "leave new frames"),
        ({"overlap_history": 0}, 101, "overlap_history"),
        ({"overlap_history": "17"}, 101, "overlap_history"),
        ({"overlap_history": "17"}, 9, "overlap_history='17' should be"),
        ({"overlap_history": 0}, 9, "overlap_history=0"),
        ({"ar_step": 10**20}, 9, "ar_step"),
        ({"causal_block_size": 2}, 9, "causal blocks of 2"),
        ({"causal_block_size": 0}, 9, "causal_block_size"),
        ({"ar_step": -1}, 9, "ar_step"),
        ({"ar_step": 1.5}, 9, "ar_step"),
        ({"base_num_frames": None}, 9, "base_num_frames"),
        ({"addnoise_condition": 1001}, 9, "addnoise_condition"),
        ({"addnoise_condition": True}, 9, "addnoise_condition"),
    ],
)
def test_bad_parameters(extra: dict[str, Any], frames: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        plan_forcing(extra, frames, temporal=4, default_block=1)


def test_bad_requests(pair: Callable[..., Pair]) -> None:
    ours, _ = pair(FORCING)
    with pytest.raises(InputError, match="last_image"):
        our_run(ours, 9, 6.0, [1], last_image=picture(0))
    with pytest.raises(InputError, match="one window"):
        images = {"image": picture(0), "last_image": picture(1)}
        our_run(ours, 29, 6.0, [1], base_num_frames=13, overlap_history=5, **images)
    video = torch.zeros(1, 3, 5, HEIGHT, WIDTH)
    with pytest.raises(InputError, match="given video"):
        our_run(ours, 9, 6.0, [1], video=video)
    with pytest.raises(InputError, match="fewer than overlap_history"):
        our_run(ours, 13, 6.0, [1], video=video, overlap_history=9)
    with pytest.raises(InputError, match="the image alone; ask for 5"):
        our_run(ours, 1, 6.0, [1], image=picture(0))
    with pytest.raises(InputError, match="image and video"):
        our_run(ours, 13, 6.0, [1], video=video, image=picture(0))


TABLE = {  # height, width, frames, guidance, shift, base_num_frames
    "T2V-14B-540P": (544, 960, 97, 6.0, 8.0, None),
    "T2V-14B-720P": (720, 1280, 121, 6.0, 8.0, None),
    "I2V-1.3B-540P": (544, 960, 97, 5.0, 5.0, None),
    "I2V-14B-540P": (544, 960, 97, 5.0, 5.0, None),
    "I2V-14B-720P": (720, 1280, 121, 5.0, 5.0, None),
    "DF-1.3B-540P": (544, 960, 97, 6.0, 8.0, 97),
    "DF-14B-540P": (544, 960, 97, 6.0, 8.0, 97),
    "DF-14B-720P": (720, 1280, 121, 6.0, 8.0, 121),
}


def test_presets(pair: Callable[..., Pair]) -> None:
    assert set(spec.PRESETS) == {f"Skywork/SkyReels-V2-{name}-Diffusers" for name in TABLE}
    for name, expected in TABLE.items():
        p = spec.PRESETS[f"Skywork/SkyReels-V2-{name}-Diffusers"]
        got = (p.height, p.width, p.num_frames, p.guidance_scale, p.flow_shift, (p.extra or {}).get("base_num_frames"))
        assert got == expected, name
        assert (p.fps, p.num_inference_steps, p.scheduler) == (24.0, 50, "unipc")
    text, image = pair(FORCING)[0].defaults(), pair(FORCING_IMAGE)[0].defaults()
    assert (text.guidance_scale, text.flow_shift) == (6.0, 8.0)
    assert (image.guidance_scale, image.flow_shift) == (5.0, 5.0)
    assert text.extra == image.extra == spec.FORCING_EXTRA
    video = pair(FORCING_VIDEO)[0].defaults()
    assert (video.guidance_scale, video.flow_shift, video.extra["overlap_history"]) == (5.0, 5.0, 17)


def test_a_model_knows_its_window(tmp_path: Path) -> None:
    """What a directory says of a family's parameter stands above the family's default, and below the request's."""
    path = make_tiny_skyreels(tmp_path, FORCING)
    (path / "kinetoscope.json").write_text(json.dumps({"defaults": {"extra": {"base_num_frames": 13}}}))
    generator = VideoGenerator.from_pretrained(path, device="cpu", dtype="float32")
    small = {"height": 32, "width": 32, "num_inference_steps": 1}
    with pytest.raises(InputError, match="base_num_frames=13"):
        generator.generate_video(PROMPT, num_frames=17, **small)
    long = generator.generate_video(PROMPT, num_frames=17, overlap_history=5, **small)
    assert long.params.extra == {**spec.FORCING_EXTRA, "base_num_frames": 13, "overlap_history": 5}
    assert long.frames.shape == (17, 32, 32, 3)
    one = generator.generate_video(PROMPT, num_frames=17, base_num_frames=17, **small)
    assert one.frames.shape == (17, 32, 32, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_cuda_equals_cpu(tmp_path: Path) -> None:
    path = make_tiny_skyreels(tmp_path, FORCING)
    given: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "num_frames": 29, "num_inference_steps": STEPS}
    given |= {"image": picture(0), "base_num_frames": 13, "overlap_history": 5, "ar_step": 1, "addnoise_condition": 20}
    expected = VideoGenerator.from_pretrained(path, device="cpu").generate_video(PROMPT, **given)
    result = VideoGenerator.from_pretrained(path, device="cuda", dtype="float32").generate_video(PROMPT, **given)
    assert (result.latents - expected.latents).abs().max() <= 1e-3 * expected.latents.std()
