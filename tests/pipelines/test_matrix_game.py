"""A Matrix-Game directory from image and action script to frames, at once and played block by block."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kinetoscope.core.errors import ConfigError, InputError
from kinetoscope.core.types import ExecutionArgs, ForwardBatch, SamplingParams
from kinetoscope.engine.engine import DenoisingEngine
from kinetoscope.engine.strategies.matrix_game import Actions, MatrixGameStrategy
from kinetoscope.loading import ModelDir
from kinetoscope.media import read_metadata, read_video
from kinetoscope.media.actions import parse_actions
from kinetoscope.models.matrix_game import spec
from kinetoscope.pipelines.presets import build_pipeline
from kinetoscope.pipelines.presets.matrix_game import MatrixGameVideo, MatrixGameWorld
from kinetoscope.pipelines.stages.images import ImageConditionStage
from kinetoscope.pipelines.stages.matrix_game import ImageThenNothing, PlayedStream, as_actions
from kinetoscope.runtime.generator import VideoGenerator
from models.tiny_matrix_game import FIXTURES, IMAGE_DIM, published_config, tiny_model

HEIGHT, WIDTH, FRAMES = 32, 48, 21
WALK = [{"keys": ["w"], "repeat": 9}, {"keys": ["w", "d"], "mouse": "right", "repeat": 12}]


def make_world(path: Path, variant: str, *, converted: bool = False) -> Path:
    """A tiny directory: the recorded transformer in the original repository's names, or converted to ours."""
    from diffusers import AutoencoderKLWan  # pyright: ignore[reportPrivateImportUsage]
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)  # noqa: TID251 - libraries initialise from the global generator
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    encoder = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=IMAGE_DIM,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
    )
    vae.save_pretrained(path / "vae")
    encoder.save_pretrained(path / "image_encoder")
    (path / "transformer").mkdir()
    name = "CausalMatrixGame2WanModel" if converted else "CausalWanModel"
    (path / "transformer" / "config.json").write_text(json.dumps(published_config(variant) | {"_class_name": name}))
    weights = path / "transformer" / "diffusion_pytorch_model.safetensors"
    if converted:
        save_file(dict(tiny_model(variant).state_dict()), weights)
    else:
        shutil.copy(FIXTURES / f"{variant}.weights.safetensors", weights)
    (path / "scheduler").mkdir()
    (path / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "SomeScheduler"}')
    index = {
        "_class_name": "MatrixGame2CausalDMDPipeline",
        "image_encoder": ["transformers", "CLIPVisionModel"],
        "scheduler": ["diffusers", "SomeScheduler"],  # published directories name one that diffusers does not have
        "transformer": ["diffusers", name],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (path / "model_index.json").write_text(json.dumps(index))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> MatrixGameWorld:
    return open_world(make_world(tmp_path_factory.mktemp("world"), "base"))


def open_world(path: Path) -> MatrixGameWorld:
    pipeline = build_pipeline(ModelDir(path, str(path)), ExecutionArgs())
    assert isinstance(pipeline, MatrixGameWorld)
    return pipeline


def request(pipeline: MatrixGameVideo, actions: Any = None, seed: int = 0, **params: Any) -> ForwardBatch:
    own = SamplingParams(
        **{"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "extra": {"actions": actions}} | params
    )
    batch = ForwardBatch(own.over(pipeline.defaults()), [""], [""], [seed])
    batch.image = torch.rand((1, 3, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(1)) * 2 - 1
    return batch


def condition_by_hand(vae: Any, image: Tensor) -> Tensor:
    """Mask on the first latent frame in four channels, latents of the image followed by nothing, normalised."""
    video = torch.cat([image.unsqueeze(2), torch.zeros(1, 3, FRAMES - 1, HEIGHT, WIDTH)], 2)
    z = vae.encode(video).latent_dist.mode()
    mean, std = (torch.tensor(vae.config[k]).view(1, -1, 1, 1, 1) for k in ("latents_mean", "latents_std"))
    mask = torch.zeros(1, 4, *z.shape[2:])
    mask[:, :, 0] = 1
    return torch.cat([mask, (z - mean) / std], 1)


@torch.no_grad()
def test_from_image_and_script_to_frames(world: MatrixGameWorld) -> None:
    batch = request(world, WALK, seed=3)
    assert batch.image is not None
    done = world.run(batch)
    assert done.frames[0].shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert done.condition is not None and done.latents is not None
    torch.testing.assert_close(done.condition, condition_by_hand(world.get_module("vae"), batch.image))
    assert done.condition.shape[1] == 20

    by_hand = ForwardBatch(done.params, [""], [""], [3])
    by_hand.condition, by_hand.image_embeds = done.condition, done.image_embeds
    by_hand.family = as_actions(parse_actions(WALK, "universal"))
    engine = DenoisingEngine(MatrixGameStrategy(world.stages["denoising"]))  # type: ignore[arg-type]
    expected = engine.run(by_hand, ExecutionArgs()).latents
    assert expected is not None
    assert torch.equal(done.latents, expected)


@torch.no_grad()
def test_image_features_are_clips_of_a_squeezed_image(world: MatrixGameWorld) -> None:
    batch = request(world)
    assert batch.image is not None
    features = world.stages["image_features"].forward(batch, world.args).image_embeds
    small = torch.nn.functional.interpolate(batch.image, (28, 28), mode="bicubic", align_corners=False) / 2 + 0.5
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = (small - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    expected = world.get_module("image_encoder")(pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(features, expected)
    assert features is not None and features.shape == (1, 5, IMAGE_DIM)


@torch.no_grad()
def test_the_condition_in_parts_is_that_of_the_whole_video(world: MatrixGameWorld) -> None:
    """However long: far from the image it settles, and its last frame is that of all later ones."""
    vae, frames = world.get_module("vae"), 60
    batch = request(world, num_frames=4 * frames - 3)
    assert batch.image is not None
    whole = ImageConditionStage(vae, world.geometry).forward(batch, world.args).condition
    assert whole is not None
    played = PlayedStream(image=ImageThenNothing(vae, batch.image, 4))
    assert played.image is not None
    batch.condition = played.image.more(3)
    for end in range(6, frames + 1, 3):
        played.reach(batch, end)
    parts = batch.condition
    assert played.image.settled and parts.shape[2] < frames, "memory does not grow"
    assert torch.equal(parts, whole[:, :, : parts.shape[2]])
    assert torch.equal(parts[:, :, -1:].expand(-1, -1, frames - parts.shape[2], -1, -1), whole[:, :, parts.shape[2] :])


@pytest.mark.parametrize(("variant", "keys", "steps"), [("gta", 2, 3), ("templerun", 7, 4)])
def test_other_layouts_and_converted_directories(tmp_path: Path, variant: str, keys: int, steps: int) -> None:
    pipeline = open_world(make_world(tmp_path / "w", variant, converted=True))
    assert pipeline.layout == {"gta": "gta_drive", "templerun": "templerun"}[variant]
    assert pipeline.defaults().num_inference_steps == steps
    batch = pipeline.run(request(pipeline, [{"keys": ["w"], "repeat": FRAMES}]))
    assert isinstance(batch.family, Actions)
    assert batch.family.keyboard.shape == (1, FRAMES, keys)
    assert (batch.family.mouse is None) == (variant == "templerun")
    assert batch.params.extra is not None
    assert batch.params.extra["actions"]["layout"] == pipeline.layout, "the record holds the script itself"
    again = pipeline.run(request(pipeline, batch.params.extra["actions"]))
    assert np.array_equal(again.frames[0], batch.frames[0])


def test_through_the_generator(tmp_path: Path) -> None:
    """The published way in: a picture, a script file, a video file with its record."""
    model = make_world(tmp_path / "w", "base")
    script = tmp_path / "walk.json"
    script.write_text(json.dumps(WALK))
    generator = VideoGenerator.from_pretrained(str(model))
    picture = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    result = generator.generate_video(
        "a path through a wood",
        image=picture,
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        actions=str(script),
        output_path=str(tmp_path / "out.mp4"),
    )
    assert len(read_video(tmp_path / "out.mp4")[0]) == FRAMES
    record = read_metadata(tmp_path / "out.mp4")
    assert len(record["params"]["extra"]["actions"]["frames"]) == 2
    assert not isinstance(result, list)


@torch.no_grad()
def test_foundation_model_by_a_scheduler(tmp_path: Path) -> None:
    """Four UniPC steps of the whole video, against diffusers' scheduler around the bare forward."""
    import diffusers

    path = make_world(tmp_path / "w", "base")
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps(index | {"_class_name": "MatrixGame2I2VPipeline"}))
    pipeline = build_pipeline(ModelDir(path, str(path)), ExecutionArgs())
    assert isinstance(pipeline, MatrixGameVideo) and not isinstance(pipeline, MatrixGameWorld)
    assert pipeline.defaults().num_inference_steps == 40
    done = pipeline.run(request(pipeline, WALK, seed=2, num_frames=17, num_inference_steps=4))
    assert isinstance(done.family, Actions) and done.condition is not None and done.image_embeds is not None

    unipc: Any = getattr(diffusers, "UniPCMultistepScheduler")  # noqa: B009 - not exported for type checkers
    scheduler = unipc(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5)
    scheduler.set_timesteps(4)
    model = tiny_model("base")
    x = torch.randn((1, 16, 5, 4, 6), generator=torch.Generator().manual_seed(2))
    given = {"condition": done.condition, "image_embeds": done.image_embeds}
    for t in scheduler.timesteps:
        actions = {"keyboard": done.family.keyboard, "mouse": done.family.mouse}
        flow = model(x, t.view(1), **given, **actions)
        x = scheduler.step(flow, t, x, return_dict=False)[0]
    assert done.latents is not None
    assert (done.latents - x).abs().max() < 1e-4 * x.std()
    with pytest.raises(InputError, match="guidance"):
        pipeline.run(request(pipeline, WALK, num_frames=17, guidance_scale=2.0))


def test_presets() -> None:
    table = {
        "Base": (352, 640, 57, 25.0, 3, 5.0, (1000, 666, 333)),
        "GTA": (352, 640, 57, 25.0, 3, 5.0, (1000, 666, 333)),
        "TempleRun": (352, 640, 57, 25.0, 4, 5.0, (1000, 750, 500, 250)),
    }
    for name, row in table.items():
        p = spec.PRESETS[f"FastVideo/Matrix-Game-2.0-{name}-Distilled-Diffusers"]
        assert p.extra is not None
        steps = p.extra["dmd_denoising_steps"]
        assert (p.height, p.width, p.num_frames, p.fps, p.num_inference_steps, p.flow_shift, steps) == row
        assert p.extra["warp_denoising_step"] is True
        assert p.extra["context_noise"] == 0
        assert p.guidance_scale == 1.0
        foundation = spec.PRESETS[f"FastVideo/Matrix-Game-2.0-{name}-Diffusers"]
        assert (foundation.num_inference_steps, foundation.flow_shift, foundation.scheduler) == (40, 5.0, "unipc")


def test_refuses(world: MatrixGameWorld, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"num_frames=25 is no whole number of blocks.*nearest: 21 or 33"):
        world.run(request(world, num_frames=25))
    with pytest.raises(InputError, match="lasts 21 frames; this video needs 33"):
        world.run(request(world, WALK, num_frames=33))
    with pytest.raises(InputError, match="no key 'x'"):
        world.run(request(world, [{"keys": ["x"]}]))
    batch = request(world)
    batch.image = None
    with pytest.raises(InputError, match="needs image="):
        world.run(batch)
    batch = request(world)
    batch.latents = torch.zeros(1, 16, 3, 4, 6)
    with pytest.raises(InputError, match="latents have shape"):
        world.run(batch)
    path = make_world(tmp_path / "w", "base")
    config = json.loads((path / "transformer" / "config.json").read_text())
    config["action_config"]["keyboard_dim_in"] = 5
    (path / "transformer" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="5 keys"):
        open_world(path)
