"""Families that are trained: a role against the steps of sampling, and weights after a step against diffusers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kinetoscope import VideoGenerator
from kinetoscope.core.errors import ConfigError, InputError
from kinetoscope.core.types import ForwardBatch
from kinetoscope.diffusion.convention import Convention
from kinetoscope.diffusion.denoiser import Denoiser
from kinetoscope.diffusion.noise import NoiseSource, randn
from kinetoscope.engine.hooks.base import Hook
from kinetoscope.engine.protocols import Step, StrategyState
from kinetoscope.loading import resolve_model
from kinetoscope.models.cosmos import spec as cosmos
from kinetoscope.models.hunyuan import spec as hunyuan
from kinetoscope.models.hunyuan15 import spec as hunyuan15
from kinetoscope.models.longcat import spec as longcat
from kinetoscope.models.wan import spec as wan
from kinetoscope.pipelines.presets.longcat import LAYOUT
from kinetoscope.train.data.encoding import Encoder, open_encoders
from kinetoscope.train.lora import LoraLayers
from kinetoscope.train.methods import make_method, method_class
from kinetoscope.train.plugins import Opened
from kinetoscope.train.plugins.hunyuan import Hunyuan15Model, HunyuanModel
from kinetoscope.train.post import LoraSection
from kinetoscope.train.post_run import run_post_recipe
from kinetoscope.train.roles import ModelBase, TrainBatch
from models.tiny_cosmos import NoGuardrail, make_tiny_cosmos, without_torchvision
from models.tiny_hunyuan import make_tiny_hunyuan, make_tiny_hunyuan_i2v
from models.tiny_hunyuan15 import make_tiny_hunyuan15
from models.tiny_longcat import MODEL as LONGCAT
from tiny import make_tiny_wan
from train.post_runs import write_recipe

PROMPTS = ["a red circle moving left", 'a cat that holds "hi"']
SEEDS = [3, 4]
TEXT_1, IMAGE_2, PREDICT_25 = "CosmosTextToWorldPipeline", "Cosmos2TextToImagePipeline", "Cosmos2_5_PredictBasePipeline"


def cosmos_maker(kind: str) -> Callable[[Path], Path]:
    return lambda path: make_tiny_cosmos(path, kind)


@dataclass(frozen=True)
class Family:
    """How a family's tiny directory is made and sampled.

    Attributes:
        oracle: diffusers' pipeline; "" where it has none.
        convention: of sampling.
        frames: of its videos; one where the oracle knows no number.
        idle: beginnings of the names of parameters that a prompt alone does not reach.
        targets: of a LoRA.
    """

    make: Callable[[Path], Path]
    oracle: str
    convention: Convention
    frames: int = 5
    told: dict[str, Any] = field(default_factory=dict[str, Any])
    idle: tuple[str, ...] = ()
    targets: tuple[str, ...] = ("to_q", "to_v")

    @property
    def size(self) -> dict[str, int]:
        return {"num_frames": self.frames, "height": 32, "width": 48}


WITHOUT_GUIDANCE = {"guidance_scale": 1.0}
FAMILIES = {
    "wan": Family(  # UniPC would round its timesteps
        lambda path: make_tiny_wan(path, scheduler="euler"), "WanPipeline", wan.CONVENTION, told=WITHOUT_GUIDANCE
    ),
    "longcat": Family(
        lambda path: LONGCAT, "", longcat.CONVENTION, told=WITHOUT_GUIDANCE, targets=("attn.qkv", "kv_linear")
    ),
    "hunyuan": Family(make_tiny_hunyuan, "HunyuanVideoPipeline", hunyuan.CONVENTION, told={"guidance_scale": 6.0}),
    "hunyuan15": Family(
        make_tiny_hunyuan15, "HunyuanVideo15Pipeline", hunyuan15.CONVENTION, told=WITHOUT_GUIDANCE,
        # images, and what the last block makes of the text
        idle=(
            "image_embedder", "transformer_blocks.1.ff_context", "transformer_blocks.1.attn.to_add_out",
            "transformer_blocks.1.attn.add_q_proj", "transformer_blocks.1.attn.norm_added_q",
        ),
    ),
    "cosmos1": Family(cosmos_maker(TEXT_1), TEXT_1, cosmos.CONVENTION_1, 9, WITHOUT_GUIDANCE),
    "cosmos2": Family(cosmos_maker(IMAGE_2), IMAGE_2, cosmos.CONVENTION_2, 1, WITHOUT_GUIDANCE),
    "cosmos25": Family(cosmos_maker(PREDICT_25), PREDICT_25, cosmos.CONVENTION_25, 5, WITHOUT_GUIDANCE),
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", FAMILIES)
KNOWN_TO_DIFFUSERS = pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.oracle])


@pytest.fixture(scope="module", autouse=True)
def stand_ins() -> Iterator[None]:
    with without_torchvision():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Name of a family -> its directory."""
    found: dict[str, str] = {}

    def get(name: str) -> str:
        if name not in found:
            found[name] = str(FAMILIES[name].make(tmp_path_factory.mktemp(name)))
        return found[name]

    return get


class Recorder(Hook):
    """Keeps (sample, noise level, output of the network) of every step."""

    name = "recorder"

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self._x = torch.empty(0)

    def on_step_start(self, state: StrategyState, step: Step) -> None:
        self._x = state.latents.clone()

    def on_step_end(self, state: StrategyState, step: Step) -> None:
        assert state.scheduler is not None and step.prediction is not None
        level = torch.full((len(self._x),), state.scheduler.sigmas[step.index])
        self.seen.append((self._x, level, step.prediction.float()))


def sample(opened: Opened, family: Family, recorder: Recorder | None = None) -> Tensor:
    params = replace(opened.pipeline.defaults(), **family.size, **family.told, num_inference_steps=3)
    run = ForwardBatch(params, PROMPTS, ["", ""], SEEDS, hooks=[recorder] if recorder else [])
    steps = opened.pipeline.iterate(run, until="decoding")
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value.latents


def prompts_batch(opened: Opened, role: ModelBase, family: Family, seed: int = 1) -> TrainBatch:
    """Both prompts with random latents of the size that is sampled."""
    shape = (opened.latent_channels(), *opened.pipeline.geometry.latent_size(*family.size.values()))
    latents = randn((len(PROMPTS), *shape), torch.Generator().manual_seed(seed))
    return role.prepare_batch(opened.encoder()(PROMPTS), latents)


@EVERY
def test_clips_become_the_latents_that_are_decoded(name: str, made: Callable[[str], str]) -> None:
    """Decoded as samples are, they give the frames that the VAE itself makes of the clip."""
    opened, family = Opened(made(name)), FAMILIES[name]
    frames, height, width = family.size.values()
    clip = (2 * torch.rand(1, 3, frames, height, width, generator=torch.Generator().manual_seed(0)) - 1).clamp(-1, 1)
    latents = opened.encode_video(clip)
    assert latents.shape[2:] == opened.pipeline.geometry.latent_size(frames, height, width)
    vae = opened.pipeline.get_module("vae")
    with torch.no_grad():
        expected = vae.decode(vae.encode(clip).latent_dist.mode(), return_dict=False)[0][0]
    expected = expected.clamp(-1, 1).add(1).mul(127.5).permute(1, 2, 3, 0).numpy()
    stage: Any = opened.pipeline.stages["decoding"]
    assert abs(stage.decode(latents[0]).astype(float) - expected).max() <= 1


@EVERY
def test_a_role_predicts_what_a_step_of_sampling_does(name: str, made: Callable[[str], str]) -> None:
    family, opened, recorder = FAMILIES[name], Opened(made(name)), Recorder()
    role = opened.role()
    batch = prompts_batch(opened, role, family)
    assert sample(opened, family, recorder).shape == batch.latents.shape
    assert len(recorder.seen) == 3
    sampler = Denoiser(opened.transformer, family.convention)
    for x, level, returned in recorder.seen:
        mine, s, out = x, level, family.convention.sign * returned
        if family.convention.preconditioning and not role.convention.preconditioning:  # a flow's sample and its level
            mine, s = x / (1 + level.view(-1, 1, 1, 1, 1)), level / (1 + level)
        with torch.no_grad():
            torch.testing.assert_close(role.predict(mine, s, batch), out, rtol=0, atol=1e-5)
            x0, noise = role.predict_x0(mine, s, batch), role.predict_noise(mine, s, batch)
        scale = max(1.0, float(x.abs().max()))  # and a noise is an x0's difference from x over the level
        torch.testing.assert_close(x0, sampler.to_x0(out, x, level), rtol=0, atol=1e-5 * scale)
        near = 1e-5 * scale / min(1.0, float(level[0]))
        torch.testing.assert_close(noise, sampler.to_noise(out, x, level), rtol=0, atol=near)


def oracle_latents(name: str, path: str, transformer: Any) -> Tensor:
    """diffusers' own sampling of a directory with other weights."""
    import diffusers

    family = FAMILIES[name]
    more = {"safety_checker": NoGuardrail()} if name.startswith("cosmos") else {}
    oracle = getattr(diffusers, family.oracle).from_pretrained(path, **more)
    oracle.set_progress_bar_config(disable=True)
    oracle.transformer.load_state_dict(transformer.state_dict())
    call: dict[str, Any] = {**family.size, **family.told, "num_inference_steps": 3, "output_type": "latent"}
    if name == "hunyuan15":
        oracle.tokenizer_max_length, oracle.tokenizer_2_max_length = 520, 64  # less padding, all of it masked
        guider = getattr(diffusers, "ClassifierFreeGuidance")  # noqa: B009 - it does not say that it exports it
        oracle.guider = guider(guidance_scale=call.pop("guidance_scale"))
    if name == "cosmos2":
        del call["num_frames"]
    draws = [torch.Generator().manual_seed(s) for s in SEEDS]
    result = oracle(prompt=PROMPTS, negative_prompt=["", ""], generator=draws, **call)
    return result.images.unsqueeze(2) if name == "cosmos2" else result[0]


@KNOWN_TO_DIFFUSERS
def test_sampling_after_a_step_has_the_weights_that_were_trained(name: str, made: Callable[[str], str]) -> None:
    family, opened = FAMILIES[name], Opened(made(name))
    role = opened.role(trainable=True)
    before = sample(opened, family)
    method = make(role, "finetune", caption_dropout=0)
    optimizer = torch.optim.AdamW(role.transformer.parameters(), lr=3e-3)
    role.on_train_start()
    method.losses("student", prompts_batch(opened, role, family), 0, torch.Generator().manual_seed(0))[
        "total"
    ].backward()
    optimizer.step()
    after = sample(opened, family)
    theirs = oracle_latents(name, made(name), opened.transformer)
    assert (after - theirs).abs().max() <= 1e-4 * theirs.std()
    assert (after - before).abs().max() > 1e-2 * theirs.std(), "the step must show"


def make(student: ModelBase, method: str, roles: dict[str, ModelBase] | None = None, **settings: Any) -> Any:
    kind = method_class(method)
    return make_method(kind.settings_class(name=method, **settings), {"student": student, **(roles or {})})


def check_reached(parameters: Any, idle: tuple[str, ...] = ()) -> None:
    """Every parameter has a gradient, but for those that nothing reads."""
    found = {n: p.grad is not None and bool(p.grad.abs().max() > 0) for n, p in parameters}
    assert len(found) >= 8
    assert [n for n, reached in found.items() if reached is n.startswith(idle or ("\0",))] == []


@EVERY
def test_gradients_reach_every_trained_parameter(name: str, made: Callable[[str], str]) -> None:
    """Of fine-tuning, of a LoRA, and of the student and the critic of DMD2."""
    family, opened = FAMILIES[name], Opened(made(name))
    role = opened.role(trainable=True)
    role.init_preprocessors(opened.encoder(), "ugly")
    batch, draw = prompts_batch(opened, role, family), torch.Generator().manual_seed(0)
    make(role, "finetune", caption_dropout=0.5).losses("student", batch, 0, draw)["total"].backward()
    check_reached(role.transformer.named_parameters(), family.idle)

    with torch.no_grad():  # and sparse attention is where the family attends to its video
        call = batch.latents, torch.tensor([0.3, 0.8]), batch
        dense = role.predict(*call)
        role.attend_with("vsa:sparsity=0.5,tile=1,2,1")
        assert (role.predict(*call) - dense).abs().max() > 1e-4
        role.attend_with("dense")
    role.transformer.zero_grad()
    if role.convention.prediction != "flow":
        with pytest.raises(ConfigError, match=r"flow models do; models\.student predicts 'edm'"):
            make(role, "dmd2", {"teacher": role, "critic": role})
    else:
        teacher, critic = opened_role(made(name)), opened_role(made(name), trainable=True)
        roles = {"teacher": teacher, "critic": critic}
        method = make(role, "dmd2", roles, steps=(1000, 500), guidance=3)
        for trained, other in ((role, critic), (critic, role)):
            own = "student" if trained is role else "critic"
            method.losses(own, batch, 0, torch.Generator().manual_seed(2))["total"].backward()
            check_reached(trained.transformer.named_parameters(), family.idle)
            assert all(p.grad is None for p in other.transformer.parameters())
            trained.transformer.zero_grad()

    layers = LoraLayers(role.transformer, LoraSection(rank=2, targets=family.targets), draw)
    for parameter in layers.parameters():
        parameter.data += 0.1 * randn(parameter.shape, draw)
    make(role, "finetune", caption_dropout=0).losses("student", batch, 0, draw)["total"].backward()
    check_reached(((n, p) for n, p in layers.named_parameters() if p.numel()))
    assert all(p.grad is None for n, p in role.transformer.named_parameters())


def opened_role(path: str, **options: Any) -> ModelBase:
    opened = Opened(path)
    role = opened.role(**options)
    role.init_preprocessors(opened.encoder(), "ugly")
    return role


@pytest.mark.parametrize(
    ("name", "pipeline"),
    [
        ("hunyuan", "HunyuanVideoDMDPipeline"),
        ("hunyuan15", "HunyuanVideo15DMDPipeline"),
        ("longcat", "LongCatVideoDMDPipeline"),
        ("cosmos25", "Cosmos2_5_PredictDMDPipeline"),
    ],
)
def test_few_step_students_are_sampled_as_they_are_trained(
    name: str, pipeline: str, made: Callable[[str], str], tmp_path: Path
) -> None:
    """DMD2's jumps from a run's noise end where the pipeline that its export names does."""
    family = FAMILIES[name]
    path = Path(shutil.copytree(made(name), tmp_path / "student"))
    index = path / "model_index.json"
    if name == "longcat":  # published without one; an export has one, and its network where it says
        (path / "dit").rename(path / "transformer")
    told = LAYOUT.index if name == "longcat" else json.loads(index.read_text())
    index.write_text(json.dumps({**told, "_class_name": pipeline}))
    extra = {"dmd_denoising_steps": [1000, 600, 300], "warp_denoising_step": True}
    (path / "kinetoscope.json").write_text(json.dumps({"defaults": {"flow_shift": 3.0, "extra": extra}}))
    opened = Opened(str(path))
    role = opened.role(shift=3.0)
    method = make(role, "dmd2", {"teacher": role, "critic": role}, steps=(1000, 600, 300))
    batch, source = prompts_batch(opened, role, family), NoiseSource(SEEDS)
    shape = batch.latents.shape[1:]
    with torch.no_grad():
        x = source.draw(shape)
        for step in range(3):
            x = method.schedule.renoise(step, method.jump(step, x, batch), lambda: source.draw(shape))
    torch.testing.assert_close(sample(opened, family), x, rtol=0, atol=1e-5)
    asked = {"extra": {**extra, "true_cfg_scale": 3.0}} if name == "hunyuan" else {"guidance_scale": 3.0}
    with pytest.raises(InputError, match="guidance is distilled"):
        sample(opened, replace(family, told=family.told | asked))
    assert opened.pipeline.defaults().num_inference_steps == 3 and not opened.pipeline.guided
    if name == "longcat":  # what has noise levels of its own
        generator = VideoGenerator.from_pretrained(path, dtype="float32")
        view = torch.zeros(32, 48, 3, dtype=torch.uint8).numpy()
        for asked, says in (({"image": view}, "image"), ({"enhance_hf": True}, "enhance_hf")):
            with pytest.raises(InputError, match=says):
                generator.generate_video(PROMPTS[0], **family.size, **asked)


def test_what_cannot_be_trained_is_said(made: Callable[[str], str], tmp_path: Path) -> None:
    opened = Opened(made("hunyuan"))
    with pytest.raises(ConfigError, match="zeros are no text"):
        opened.role(uncond="zero")
    role = opened.role(trainable=True)
    batch = prompts_batch(opened, role, FAMILIES["hunyuan"])
    with pytest.raises(ConfigError, match="one noise level a video"):
        make(role, "diffusion_forcing", caption_dropout=0).losses("student", batch, 0, torch.Generator())
    with pytest.raises(ConfigError, match="begins from an image"):
        Opened(str(make_tiny_hunyuan_i2v(tmp_path / "i2v", "token_replace"))).role()
    with pytest.raises(ConfigError, match="next timestep"):
        Opened(str(make_tiny_hunyuan15(tmp_path / "meanflow", meanflow=True))).role()
    with pytest.raises(ConfigError, match="continues given frames"):
        Opened(str(make_tiny_cosmos(tmp_path / "video", "CosmosVideoToWorldPipeline"))).role()
    with pytest.raises(ConfigError, match="has two transformers"):
        Opened(str(make_tiny_wan(tmp_path / "experts", kind="a14b"))).role()
    with pytest.raises(ConfigError, match="reads 36 channels and makes 16"):
        Opened(str(make_tiny_wan(tmp_path / "wan-i2v", kind="i2v"))).role()
    edm = Opened(made("cosmos1")).role(trainable=True)
    with pytest.raises(ConfigError, match="min_snr is for predictions of noise"):
        make(edm, "finetune", min_snr=5.0)
    assert isinstance(role, HunyuanModel) and role.guidance_scale == 6.0
    assert isinstance(Opened(made("hunyuan15")).role(), Hunyuan15Model)


def test_rows_of_a_data_set_hold_the_latents_of_the_family(made: Callable[[str], str]) -> None:
    model = resolve_model(made("cosmos1"))
    pixels = (255 * torch.rand(9, 32, 48, 3, generator=torch.Generator().manual_seed(0))).to(torch.uint8)
    clip = pixels.permute(3, 0, 1, 2).unsqueeze(0).float() / 127.5 - 1
    encoder = Encoder(open_encoders(model))
    torch.testing.assert_close(encoder.latents(pixels.numpy()), Opened(made("cosmos1")).encode_video(clip)[0])
    with pytest.raises(ConfigError, match="one T5 text encoder"):
        open_encoders(resolve_model(made("hunyuan")))


def test_edm_levels_are_log_normal(made: Callable[[str], str]) -> None:
    """Those of arXiv 2206.00364, section 5, with the logit's mean and deviation; a shift multiplies levels."""
    method = make(Opened(made("cosmos1")).role(trainable=True, shift=2.0), "finetune", logit_mean=-1.2, logit_std=1.2)
    levels = method.levels(40000, torch.Generator().manual_seed(0)).log()
    assert abs(float(levels.mean()) - (-1.2 + torch.tensor(2.0).log())) < 0.02 and abs(float(levels.std()) - 1.2) < 0.02
    ends = method.student.convention.level(torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(ends, torch.tensor([0.002, 1.0, 80.0]))


def test_a_recipe_tunes_a_hunyuan_lora_that_diffusers_loads(made: Callable[[str], str], tmp_path: Path) -> None:
    """From clips by the family's own VAE and text encoders to latents of diffusers' pipeline with the file."""
    import diffusers

    from kinetoscope import VideoGenerator

    path = made("hunyuan")
    models = {"student": {"init_from": path, "trainable": True, "lora": {"rank": 4, "alpha": 8.0}}}
    optimizer = {"learning_rate": 0.05, "warmup": 0, "ema": 0.5}
    recipe = write_recipe(tmp_path / "a", Path(path), models=models, optimizer=optimizer, loop={"steps": 2})
    out = run_post_recipe(recipe)
    oracle: Any = getattr(diffusers, FAMILIES["hunyuan"].oracle).from_pretrained(path)
    oracle.set_progress_bar_config(disable=True)
    params: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2}

    def theirs() -> Tensor:
        draw = torch.Generator().manual_seed(7)
        return oracle("a red circle", generator=draw, guidance_scale=6.0, output_type="latent", **params).frames

    before = theirs()
    oracle.load_lora_weights(out, weight_name="pytorch_lora_weights.safetensors")
    after = theirs()
    lora = str(out / "pytorch_lora_weights.safetensors")
    ours = VideoGenerator.from_pretrained(path, device="cpu", dtype="float32", lora=lora)
    made_here = ours.generate_video("a red circle", seed=7, **params).latents
    assert (after - before).abs().max() > 1e-2, "training must show"
    torch.testing.assert_close(torch.as_tensor(made_here), after[0], rtol=0, atol=1e-4)


def test_a_recipe_tunes_cosmos_and_diffusers_opens_the_result(made: Callable[[str], str], tmp_path: Path) -> None:
    path = made("cosmos25")
    models = {"student": {"init_from": path, "trainable": True, "uncond": "empty"}}
    out = run_post_recipe(write_recipe(tmp_path / "a", Path(path), models=models, loop={"steps": 1}))
    opened = Opened(str(out))
    ours = sample(opened, FAMILIES["cosmos25"])
    theirs = oracle_latents("cosmos25", str(out), opened.transformer)
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.std()
    before = sample(Opened(path), FAMILIES["cosmos25"])
    assert (ours - before).abs().max() > 1e-2 * theirs.std(), "training must show"
