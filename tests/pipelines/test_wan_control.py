"""Wan2.1-Fun directories: videos to follow, first frames and pictures to be like, against recorded and plain runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kinetoscope import VideoGenerator
from kinetoscope.core.errors import ConfigError, InputError
from kinetoscope.core.types import ExecutionArgs, ForwardBatch, SamplingParams
from kinetoscope.diffusion.noise import NoiseSource
from kinetoscope.loading import resolve_model
from kinetoscope.models.wan import original, spec
from kinetoscope.models.wan.transformer import WanTransformer3DModel
from kinetoscope.pipelines.catalogue import known_models
from kinetoscope.pipelines.presets import build_pipeline
from kinetoscope.pipelines.presets.wan import WanCamera, WanControl, WanVideoToVideo
from kinetoscope.pipelines.stages.wan_control import pack_frames
from kinetoscope.runtime.replay import replay
from models.tiny_wan_fun import (
    CLIP,
    FEATURES,
    FIXTURES,
    GUIDANCE,
    KINDS,
    POSES,
    RUNS,
    SHAPE,
    SHIFT,
    SIZE,
    STEPS,
    TOKENS,
    AverageVAE,
    authors_name,
    clip_features,
    clip_pixels,
    fill,
    pose_lines,
    random,
    run_texts,
    tiny_config,
    tiny_fun,
)
from tiny import make_tiny_wan, perturb

RECORDED = load_file(FIXTURES / "fixtures.safetensors")
PROMPT, NEGATIVE = "a red circle moving left on black", "a blue cat"


class Encoder(nn.Module):
    """`clip_features` as a CLIP vision model is called."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))

    def forward(self, pixels: Tensor, output_hidden_states: bool) -> Any:
        return SimpleNamespace(hidden_states=[clip_features(pixels), None])


def process(images: list[np.ndarray], return_tensors: str) -> Any:
    return SimpleNamespace(pixel_values=torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1)


def set_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def authors_directory(path: Path, kind: str) -> Path:
    """A tiny directory whose transformer has the authors' file: their configuration and names, as published."""
    make_tiny_wan(path, kind="i2v", scheduler="euler", shift=SHIFT)
    set_json(path / "model_index.json", _class_name="WanFunControlPipeline")
    set_json(path / "image_encoder" / "config.json", image_size=128)  # 257 tokens, as published
    config = tiny_config(kind)
    theirs = {
        "_class_name": "WanTransformer3DModel", "model_type": "i2v", "patch_size": [1, 2, 2], "text_len": TOKENS,
        "in_dim": config.in_channels, "dim": config.dim, "ffn_dim": config.ffn_dim, "freq_dim": config.freq_dim,
        "text_dim": FEATURES, "out_dim": 16, "num_heads": 2, "num_layers": 2, "window_size": [-1, -1],
        "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6, "add_ref_conv": config.add_ref_conv,
        "add_control_adapter": config.add_control_adapter,
    }  # fmt: skip
    (path / "transformer" / "config.json").write_text(json.dumps(theirs))
    weights = {authors_name(name): value for name, value in tiny_fun(kind).state_dict().items()}
    save_file(weights, path / "transformer" / "diffusion_pytorch_model.safetensors")
    return path


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory of every kind."""
    return {k: authors_directory(tmp_path_factory.mktemp(k), k) for k in KINDS}


@pytest.fixture(autouse=True)
def narrow_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published width of image features is no field of the authors' files; the tiny models' is smaller."""
    monkeypatch.setattr(original, "IMAGE_DIM", FEATURES)


def padded(text: Tensor) -> Tensor:
    return nn.functional.pad(text, (0, 0, 0, TOKENS - len(text))).unsqueeze(0)


def recorded_batch(name: str, tmp_path: Path, **params: Any) -> ForwardBatch:
    """What a recorded run was given."""
    run, extra = RUNS[name], dict[str, Any]()
    frames, height, width = SIZE
    if "ref_image" in run:
        pixels = (clip_pixels(1, run["ref_image"])[0, :, 0] * 255).round().to(torch.uint8)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / "ref.png")
        extra["ref_image"] = str(tmp_path / "ref.png")
    if "camera" in run:
        (tmp_path / "poses.txt").write_text("\n".join(pose_lines(POSES)))
        extra["camera"] = str(tmp_path / "poses.txt")
    cond, uncond = run_texts()
    made = SamplingParams(
        height=height, width=width, num_frames=frames, fps=16.0, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        extra=extra,
    )  # fmt: skip
    return ForwardBatch(
        SamplingParams(**params).over(made),
        [PROMPT],
        [NEGATIVE],
        [0],
        prompt_embeds=padded(cond),
        negative_embeds=padded(uncond),
        latents=random((1, *SHAPE[1:]), 9),
        image=clip_pixels(1, run["image"])[:, :, 0] * 2 - 1 if "image" in run else None,
        video=clip_pixels(frames, run["video"]) * 2 - 1 if "video" in run else None,
    )


def stand_in_pipeline(path: Path, cfg: str = "sequential") -> Any:
    """The pipeline of a directory around the stand-ins, without its text encoder."""
    narrow = {"image_processor": process, "image_encoder": Encoder(), "vae": AverageVAE()}
    pipeline = build_pipeline(resolve_model(path), ExecutionArgs(cfg=cfg), modules=narrow)
    del pipeline.stages["text_encoding"], pipeline.stages["decoding"]
    return pipeline


@pytest.mark.parametrize("cfg", ["sequential", "batched"])
@pytest.mark.parametrize("name", RUNS)
def test_recorded_runs(name: str, cfg: str, directories: dict[str, Path], tmp_path: Path) -> None:
    """The whole published pipeline, on a transformer of the authors' file."""
    pipeline = stand_in_pipeline(directories[RUNS[name]["kind"]], cfg)
    assert type(pipeline) is (WanCamera if name == "camera" else WanControl)
    latents = pipeline.run(recorded_batch(name, tmp_path)).latents[0]
    expected = RECORDED[f"run.{name}"]
    assert (latents - expected).abs().max() <= 1e-4 * expected.std()


def test_without_a_picture_features_are_zero(directories: dict[str, Path], tmp_path: Path) -> None:
    pipeline = stand_in_pipeline(directories["control"])
    batch = pipeline.run(recorded_batch("control", tmp_path))
    assert batch.image_embeds.shape == (1, CLIP, FEATURES) and not batch.image_embeds.any()
    assert batch.condition.shape[1] == 32 and not batch.condition[:, 16:].any()


def test_one_latent_frame_has_no_first_frame(directories: dict[str, Path], tmp_path: Path) -> None:
    """As published: with a single latent frame the channels of the first frame stay zero."""
    pipeline = stand_in_pipeline(directories["control"])
    batch = recorded_batch("control.image", tmp_path, num_frames=1)
    assert batch.latents is not None
    batch.latents = batch.latents[:, :, :1]
    assert not pipeline.run(batch).condition[:, 16:].any()


def test_the_camera_of_a_file_is_kept(directories: dict[str, Path], tmp_path: Path) -> None:
    """The record of a run says where the camera was, not only in which file; told so, it is the same run."""
    batch = recorded_batch("camera", tmp_path)
    pipeline = stand_in_pipeline(directories["camera"])
    first = pipeline.run(batch)
    kept = json.loads(json.dumps(dict(first.params.extra or {})["camera"]))
    assert len(kept["poses"]) == SIZE[0]
    again = pipeline.run(recorded_batch("camera", tmp_path, extra={"camera": kept}))
    assert torch.equal(again.latents, first.latents)


def test_moves_differ(directories: dict[str, Path], tmp_path: Path) -> None:
    pipeline = stand_in_pipeline(directories["camera"])
    ends = []
    for camera in ("still", "pan-left", {"move": "pan-left", "speed": 0}, {"moves": ["pan-left", "zoom-in"]}):
        batch = pipeline.run(recorded_batch("camera", tmp_path, extra={"camera": camera}, num_inference_steps=1))
        assert batch.params.extra["camera"] == camera
        ends.append(batch.latents)
    assert torch.equal(ends[0], ends[2])
    assert not torch.equal(ends[0], ends[1]) and not torch.equal(ends[1], ends[3])


@pytest.mark.parametrize(
    ("camera", "words"),
    [(None, "needs camera=: a move"), ("pan-sideways", "neither a move"), ({"poses": POSES[:5]}, "has 5 poses")],
)
def test_cameras_refused(camera: Any, words: str, directories: dict[str, Path], tmp_path: Path) -> None:
    pipeline = stand_in_pipeline(directories["camera"])
    with pytest.raises(InputError, match=words):
        pipeline.run(recorded_batch("camera", tmp_path, extra={"camera": camera}))


def test_an_adapter_that_does_not_fit_the_vae_is_refused(tmp_path: Path) -> None:
    path = authors_directory(tmp_path, "camera")
    set_json(path / "transformer" / "config.json", downscale_factor_control_adapter=16)
    with pytest.raises(ConfigError, match=r"\(24, 16\); with this VAE they should be \(24, 8\)"):
        stand_in_pipeline(path)


def test_frames_of_a_latent_frame_are_packed() -> None:
    """The first frame four times, then four and four; channel by channel, the frames of a latent frame together."""
    x = torch.arange(9.0)[:, None, None, None] + torch.tensor([0.0, 100.0])[:, None, None]  # [9, 2, 1, 1]
    packed = pack_frames(x, 4)[:, :, 0, 0]
    assert packed[:4].T.tolist() == [[0, 0, 0, 0], [1, 2, 3, 4], [5, 6, 7, 8]]
    assert torch.equal(packed[4:], packed[:4] + 100)


# -- directories as diffusers writes them, through the generator -------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As IRMChen/Wan2.1-Fun-1.3B-Control-Diffusers: diffusers' transformer with 48 channels, a video-to-video index."""
    from diffusers import WanTransformer3DModel as Oracle

    path = make_tiny_wan(tmp_path_factory.mktemp("published"), kind="i2v", shift=SHIFT)
    oracle = Oracle(
        num_attention_heads=2, attention_head_dim=12, in_channels=48, out_channels=16, text_dim=32, freq_dim=256,
        ffn_dim=48, num_layers=2, image_dim=24, added_kv_proj_dim=24, rope_max_seq_len=128,
    )  # fmt: skip
    perturb(oracle, 5)
    oracle.save_pretrained(path / "transformer")
    set_json(path / "model_index.json", _class_name="WanVideoToVideoPipeline")
    return path


@pytest.fixture(scope="module")
def generator(published: Path) -> VideoGenerator:
    return VideoGenerator.from_pretrained(published, device="cpu", dtype="float32")


def clip(frames: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (frames, 32, 48, 3), dtype=np.uint8)


REQUEST: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": STEPS, "seed": 4}


def plain_run(path: Path, video: np.ndarray, image: np.ndarray | None, guidance: float) -> Tensor:
    """The run written out, with diffusers' own parts."""
    from diffusers import WanImageToVideoPipeline

    pipe: Any = WanImageToVideoPipeline.from_pretrained(path)
    tensor = lambda frames: torch.from_numpy(frames).permute(3, 0, 1, 2).unsqueeze(0).float() / 127.5 - 1  # noqa: E731
    mean, std = (torch.tensor(pipe.vae.config[k]).view(1, -1, 1, 1, 1) for k in ("latents_mean", "latents_std"))
    encode = lambda x: (pipe.vae.encode(x).latent_dist.mode() - mean) / std  # noqa: E731
    control = encode(tensor(video))
    first = torch.zeros_like(control)
    features = torch.zeros(1, 17, 24)
    if image is not None:
        first[:, :, :1] = encode(tensor(image[None]))
        features = pipe.encode_image(Image.fromarray(image), "cpu")
    texts = pipe.encode_prompt(PROMPT, NEGATIVE, True, max_sequence_length=512)
    latents = NoiseSource([4]).draw(control.shape[1:])
    pipe.scheduler.set_timesteps(STEPS)
    for t in pipe.scheduler.timesteps:
        rows = [
            pipe.transformer(torch.cat([latents, control, first], 1), t.view(1), text, features, return_dict=False)[0]
            for text in texts
        ]
        latents = pipe.scheduler.step(rows[1] + guidance * (rows[0] - rows[1]), t, latents, return_dict=False)[0]
    return latents[0]


@pytest.mark.parametrize("with_image", [False, True])
def test_a_run_written_out(published: Path, generator: VideoGenerator, with_image: bool) -> None:
    assert type(generator.pipeline) is WanControl
    video, image = clip(7), clip(1)[0] if with_image else None
    with torch.no_grad():
        expected = plain_run(published, video[:5], image, 5.0)
    result = generator.generate_video(PROMPT, NEGATIVE, guidance_scale=5.0, video=video, image=image, **REQUEST)
    assert (result.latents - expected).abs().max() <= 1e-4 * expected.std()
    assert result.frames.shape == (5, 32, 48, 3)


def test_a_batch_follows_one_video(generator: VideoGenerator) -> None:
    request = {**REQUEST, "seed": [4, 5], "num_inference_steps": 2}
    both = generator.generate_video([PROMPT, "a cat"], NEGATIVE, video=clip(5), **request)
    alone = generator.generate_video("a cat", NEGATIVE, video=clip(5), **{**request, "seed": 5})
    assert (both[1].latents - alone.latents).abs().max() <= 1e-4 * alone.latents.std()


def test_a_camera_through_the_generator(tmp_path: Path) -> None:
    """A file of poses to a written video, and the same frames from its record when the file is gone."""
    path = make_tiny_wan(tmp_path / "model", kind="i2v", shift=SHIFT)
    narrow = {"in_channels": 32, "add_control_adapter": True}
    set_json(path / "transformer" / "config.json", **narrow)
    model = WanTransformer3DModel(original.read_config(json.loads((path / "transformer" / "config.json").read_text())))
    fill(model)
    save_file(model.state_dict(), path / "transformer" / "diffusion_pytorch_model.safetensors")
    set_json(path / "model_index.json", _class_name="WanFunControlPipeline")
    poses = tmp_path / "poses.txt"
    poses.write_text("\n".join(pose_lines(POSES)))
    generator = VideoGenerator.from_pretrained(path, device="cpu", dtype="float32")
    defaults = generator.defaults()
    assert (defaults.height, defaults.num_frames) == (480, 81)
    told: dict[str, Any] = {"camera": str(poses), **REQUEST}
    result = generator.generate_video(PROMPT, NEGATIVE, output_path=tmp_path / "video.mp4", **told)
    seen = generator.generate_video(PROMPT, NEGATIVE, image=clip(1)[0], **told)
    still = generator.generate_video(PROMPT, NEGATIVE, **{**told, "camera": "still"})
    assert not torch.equal(result.latents, seen.latents) and not torch.equal(result.latents, still.latents)
    poses.unlink()
    assert replay(tmp_path / "video.mp4", model=str(path)).identical


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"video": clip(5), "strength": 0.5}, "strength=0.5 .* follows"),
        ({}, "needs video="),
        ({"video": clip(4)}, "has 4 frames and num_frames=5"),
        ({"video": clip(5), "ref_image": "x.png"}, "reads no ref_image"),
        ({"video": clip(5), "last_image": clip(1)[0], "image": clip(1)[0]}, "takes no last_image"),
    ],
)
def test_refused(generator: VideoGenerator, given: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        generator.generate_video(PROMPT, NEGATIVE, **REQUEST, **given)


def test_pictures_to_be_like_are_addresses(directories: dict[str, Path], tmp_path: Path) -> None:
    pipeline = stand_in_pipeline(directories["reference"])
    with pytest.raises(InputError, match="ref_image=3 should be a path"):
        pipeline.run(recorded_batch("reference", tmp_path, extra={"ref_image": 3}))
    with pytest.raises(InputError, match=r"missing\.png"):
        pipeline.run(recorded_batch("reference", tmp_path, extra={"ref_image": "missing.png"}))


def test_video_to_video_directories_without_channels_start_from_the_video(tmp_path: Path) -> None:
    path = make_tiny_wan(tmp_path)
    set_json(path / "model_index.json", _class_name="WanVideoToVideoPipeline")
    assert type(build_pipeline(resolve_model(path), ExecutionArgs())) is WanVideoToVideo


def test_channels_that_no_control_model_has_are_refused(tmp_path: Path) -> None:
    path = make_tiny_wan(tmp_path, kind="i2v")
    set_json(path / "model_index.json", _class_name="WanVideoToVideoPipeline")
    with pytest.raises(ConfigError, match=r"in_channels=36 .* should be 48"):
        build_pipeline(resolve_model(path), ExecutionArgs())


FUN = {  # height, width, frames, steps, guidance, shift, scheduler
    "IRMChen/Wan2.1-Fun-1.3B-Control-Diffusers": (832, 480, 49, 50, 6.0, 3.0, "unipc"),
    "alibaba-pai/Wan2.1-Fun-1.3B-Control": (832, 480, 49, 50, 6.0, 5.0, "euler"),
    "alibaba-pai/Wan2.1-Fun-14B-Control": (832, 480, 49, 50, 6.0, 5.0, "euler"),
    "alibaba-pai/Wan2.1-Fun-V1.1-1.3B-Control": (832, 480, 49, 50, 6.0, 5.0, "euler"),
    "alibaba-pai/Wan2.1-Fun-V1.1-14B-Control": (832, 480, 49, 50, 6.0, 5.0, "euler"),
    "alibaba-pai/Wan2.1-Fun-V1.1-1.3B-Control-Camera": (480, 832, 81, 50, 6.0, 5.0, "euler"),
    "alibaba-pai/Wan2.1-Fun-V1.1-14B-Control-Camera": (480, 832, 81, 50, 6.0, 5.0, "euler"),
}


def test_presets() -> None:
    """FastVideo's preset and VideoX-Fun's examples; see `spec.FUN_PRESETS`."""
    assert set(spec.FUN_PRESETS) == set(FUN)
    for name, expected in FUN.items():
        p = spec.FUN_PRESETS[name]
        sizes = (p.height, p.width, p.num_frames, p.num_inference_steps)
        assert (*sizes, p.guidance_scale, p.flow_shift, p.scheduler) == expected
        assert p.fps == 16


def test_catalogue_and_defaults(generator: VideoGenerator) -> None:
    model = next(m for m in known_models() if m.name == spec.FUN_CONTROL)
    assert model.tasks == ("control",) and "recorded runs" in model.status
    ours = asdict(generator.defaults())
    assert (ours["height"], ours["num_frames"], ours["guidance_scale"]) == (832, 49, 6.0)
