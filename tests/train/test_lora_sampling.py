"""A LoRA that was distilled says how it is sampled, and the base model with it is sampled so."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kinetoscope import VideoGenerator
from kinetoscope.core.errors import CompositionError, ConfigError, InputError, ModelLoadError
from kinetoscope.loading.lora_sampling import HEADER, LoraSampling
from kinetoscope.runtime.replay import replay
from kinetoscope.train.checkpoint import load_checkpoint
from kinetoscope.train.lora import COMFYUI_FILE, DIFFUSERS_FILE
from kinetoscope.train.post import STUDENT, load_post_recipe
from kinetoscope.train.post_export import export_sampling
from kinetoscope.train.post_run import run_post_recipe
from kinetoscope.train.trainer import Trainer
from train.post_runs import write_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "lora_4step.yaml"
STEPS = {"dmd_denoising_steps": [1000, 750, 500, 250], "warp_denoising_step": True}
EXPORT: dict[str, Any] = {
    "dtype": "float32",
    "index": {"_class_name": "WanDMDPipeline"},
    "defaults": {"num_inference_steps": 4, "guidance_scale": 1.0, "flow_shift": 5.0, "extra": STEPS},
}
ASKED: dict[str, Any] = {"height": 16, "width": 32, "num_frames": 5, "seed": 7}


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two steps of dmd2 give."""
    lora = {"rank": 4}
    role = {"init_from": str(model), "trainable": True, "lora": lora}
    recipe = write_recipe(
        tmp_path_factory.mktemp("run"), model,
        models={"student": role, "teacher": {"init_from": str(model)}, "critic": role},
        method={"name": "dmd2", "student_every": 1, "warp": True},
        optimizer={"learning_rate": 0.05, "warmup": 0}, loop={"steps": 2}, export=EXPORT,
    )  # fmt: skip
    return run_post_recipe(recipe)


def opened(model: Path, **options: Any) -> VideoGenerator:
    return VideoGenerator.from_pretrained(model, device="cpu", dtype="float32", **options)


def test_four_steps_of_the_base_model(model: Path, made: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"  # the oracle: a directory that says it, with the LoRA's weights
    shutil.copytree(model, few)
    index = json.loads((few / "model_index.json").read_text())
    (few / "model_index.json").write_text(json.dumps(index | EXPORT["index"]))
    (few / "kinetoscope.json").write_text(json.dumps({"defaults": EXPORT["defaults"]}))
    oracle = opened(few)
    untrained = oracle.generate_video("a red circle", **ASKED)
    oracle.load_lora(made / DIFFUSERS_FILE)
    expected = oracle.generate_video("a red circle", **ASKED)
    assert not torch.equal(expected.latents, untrained.latents), "training must show"
    for name in (DIFFUSERS_FILE, COMFYUI_FILE):
        generator = opened(model, lora=made / name)
        video = generator.generate_video("a red circle", **ASKED, output_path=tmp_path / "few.mp4")
        assert torch.equal(video.latents, expected.latents)
        assert (video.params.num_inference_steps, video.params.guidance_scale) == (4, 1.0)
    assert replay(tmp_path / "few.mp4", model=str(model), files=made).identical
    with pytest.raises(InputError, match=r"num_inference_steps=30, but this model was distilled for the 4 timesteps"):
        generator.generate_video("a red circle", **ASKED, num_inference_steps=30)
    two = generator.generate_video("a red circle", **ASKED, num_inference_steps=2, dmd_denoising_steps=[1000, 500])
    assert two.params.num_inference_steps == 2
    later = opened(model)
    later.load_lora(made)
    assert later.defaults() == opened(model).defaults(), "how it is sampled is asked when the model is opened"
    assert "--lora pytorch_lora_weights.safetensors" in (made / "README.md").read_text()
    trainer = Trainer(load_post_recipe(made.parents[1] / "recipe.yaml"), tmp_path)
    trainer.load(load_checkpoint(made.parent / "checkpoints" / "step-00000002.pt"))
    trainer.learners[STUDENT].finish()
    sampling = export_sampling(trainer)
    assert sampling is not None
    fields = {name: value for name, value in ASKED.items() if name != "seed"}
    judged = trainer.roles[STUDENT].opened.sampled_as(sampling).sample(["a red circle"], [7], **fields)
    assert judged.latents is not None, "what validation sees is what the LoRA's file gives"
    torch.testing.assert_close(judged.latents[0], expected.latents, rtol=0, atol=1e-4)


def test_the_recipe_says_one_thing(tmp_path: Path) -> None:
    """Its student is sampled in the steps that it is distilled for; and eight devices take its update."""
    recipe = load_post_recipe(RECIPE, ["parallel.replicas=8", "parallel.fsdp=true"])
    defaults, method = recipe.export.defaults, recipe.method.model_dump()
    assert tuple(defaults["extra"]["dmd_denoising_steps"]) == tuple(method["steps"])
    assert defaults["extra"]["warp_denoising_step"] == method["warp"]
    assert defaults["num_inference_steps"] == len(method["steps"]) == 4 and defaults["guidance_scale"] == 1
    assert defaults["flow_shift"] == recipe.models[STUDENT].shift
    assert recipe.models[STUDENT].lora and recipe.parallel.world == recipe.loop.accumulate == 8


@pytest.mark.distributed
def test_worker_processes_sample_so_too(model: Path, made: Path) -> None:
    prompts = ["a red circle", "a blue square"]
    expected = opened(model, lora=made).generate_video(prompts, **ASKED, batch_size=1)
    with opened(model, lora=made, parallel="replicas=2") as generator:
        videos = generator.generate_video(prompts, **ASKED)
    for video, alone in zip(videos, expected, strict=True):
        assert video.params.num_inference_steps == 4
        torch.testing.assert_close(video.latents, alone.latents, rtol=0, atol=1e-5)


def with_header(file: Path, to: Path, **entries: str) -> Path:
    """A copy of a LoRA's file with other entries in its header."""
    with safe_open(file, "pt") as content:
        header = dict(content.metadata())
    to.parent.mkdir(exist_ok=True)
    save_file(load_file(file), to, header | entries)
    return to


def test_files_that_do_not_fit(model: Path, made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = made / DIFFUSERS_FILE
    said = LoraSampling.read(file)
    assert said == LoraSampling("WanPipeline", EXPORT["index"], EXPORT["defaults"])
    other = LoraSampling("WanPipeline", {}, {"num_inference_steps": 8})
    eight = with_header(file, tmp_path / "eight.safetensors", **other.header())
    with pytest.raises(CompositionError, match=r"other ways of sampling, and cannot be used together"):
        opened(model, lora=[file, eight])
    assert opened(model, lora=[eight]).defaults().num_inference_steps == 8
    for text in ("{", "[]", '{"of": "x"}', '{"of": "x", "index": [], "defaults": {}}'):
        broken = with_header(file, tmp_path / "broken.safetensors", **{HEADER: text})
        with pytest.raises(ModelLoadError, match=f"{HEADER} in its header is not readable"):
            opened(model, lora=broken)
    image = LoraSampling("WanImageToVideoPipeline", EXPORT["index"], EXPORT["defaults"])
    with caplog.at_level(logging.WARNING, "kinetoscope.lora"):
        generator = opened(model, lora=with_header(file, tmp_path / "image.safetensors", **image.header()))
    assert "is a WanPipeline: it is sampled as without the LoRA" in caplog.text
    assert generator.defaults() == opened(model).defaults()


def test_a_lora_has_no_scheduler(model: Path, tmp_path: Path) -> None:
    models = {"student": {"init_from": str(model), "trainable": True, "lora": {}}}
    recipe = write_recipe(tmp_path, model, models=models, export={"scheduler": {"shift": 3}})
    with pytest.raises((ConfigError, ValidationError), match=r"export\.scheduler is of a directory"):
        load_post_recipe(recipe)
