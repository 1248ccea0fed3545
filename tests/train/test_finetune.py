"""Fine-tuning and LoRA: losses against closed forms, levels against their distributions, files against diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from kinetoscope.core.errors import ConfigError
from kinetoscope.diffusion.convention import Convention
from kinetoscope.diffusion.denoiser import Denoiser
from kinetoscope.diffusion.few_step import FewStepRun, FewStepSchedule
from kinetoscope.diffusion.noise import NoiseSource, randn
from kinetoscope.train.checkpoint import load_checkpoint
from kinetoscope.train.loop import step_generator
from kinetoscope.train.lora import COMFYUI_FILE, DIFFUSERS_FILE, LoraLayers, authors_name
from kinetoscope.train.methods.finetune import Finetune, FinetuneSettings, snr_weight
from kinetoscope.train.plugins.wan import WanModel
from kinetoscope.train.post import STUDENT, LoraSection, load_post_recipe
from kinetoscope.train.post_run import run_post_recipe
from kinetoscope.train.roles import Text, TrainBatch
from kinetoscope.train.trainer import Trainer
from models.tiny_causal_wan import TEXT, TINY, tiny_causal
from tiny import make_tiny_wan
from train.post_runs import write_recipe


class Line(torch.nn.Module):
    """A network whose output is a x + b s + c mean(text): its loss and gradient are a few lines of algebra."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Parameter(torch.tensor(v)) for v in (0.3, -0.2, 0.5))

    def forward(self, x: Any, timestep: Any, encoder_hidden_states: Any, text_lengths: Any) -> Any:
        shape = (-1, 1, 1, 1, 1)
        text = encoder_hidden_states.mean((1, 2)).view(shape)
        return self.a * x + self.b * (timestep / 1000).view(shape) + self.c * text


def method(network: Any, shift: float = 1.0, **settings: Any) -> Finetune:
    role = WanModel(network, trainable=True, shift=shift)
    role.init_preprocessors(lambda prompts: Text(torch.full((1, 3, 2), -1.0), torch.tensor([1])))
    return Finetune({"student": role}, FinetuneSettings(name="finetune", **settings))


def batch(rows: int = 64) -> TrainBatch:
    draw = torch.Generator().manual_seed(1)
    text = Text(randn((rows, 3, 2), draw), torch.full((rows,), 3))
    return TrainBatch(randn((rows, 2, 3, 4, 4), draw), text)


def test_the_loss_and_its_gradient_in_closed_form() -> None:
    """Over a linear network, with the levels, the noise and the dropped captions drawn again by hand."""
    network, data = Line(), batch()
    tuning = method(network, shift=3.0, caption_dropout=0.5, logit_mean=0.4, logit_std=0.7)
    total = tuning.losses("student", data, 0, step_generator(0, 0))["total"]
    total.backward()
    draw = step_generator(0, 0)
    u = 1 / (1 + torch.exp(-(0.4 + 0.7 * randn((64,), draw))))
    s = (3 * u / (1 + 2 * u)).view(-1, 1, 1, 1, 1)
    noise = randn(data.latents.shape, draw)
    dropped = torch.rand(64, generator=draw) < 0.5
    assert 20 < int(dropped.sum()) < 44
    text = torch.where(dropped, torch.tensor(-1.0), data.text.states.mean((1, 2))).view(s.shape)
    x = (1 - s) * data.latents + s * noise
    residual = 0.3 * x - 0.2 * s + 0.5 * text - (noise - data.latents)
    assert float(total.detach()) == pytest.approx(float(residual.square().mean()), rel=1e-5)
    for parameter, slope in ((network.a, x), (network.b, s), (network.c, text)):
        assert parameter.grad is not None
        expected = (2 * residual * slope).mean()
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)
    assert list(tuning.updates(3)) == ["student"]


@pytest.mark.parametrize(
    ("settings", "shift"),
    [
        ({"sampling": "uniform"}, 1.0),
        ({"sampling": "uniform"}, 4.0),
        ({"sampling": "logit_normal", "logit_mean": 0.5, "logit_std": 1.5}, 1.0),
        ({"sampling": "mode", "mode_scale": 1.0}, 1.0),
        ({"sampling": "mode", "mode_scale": -0.5}, 1.0),
    ],
)
def test_levels_have_their_distributions(settings: dict[str, Any], shift: float) -> None:
    """The share of draws below each of nine levels, against the distribution function."""
    draws = method(Line(), shift, **settings).levels(40000, step_generator(0, 1)).numpy()
    grid = np.linspace(0.1, 0.9, 9)
    back = grid / (shift - (shift - 1) * grid)  # before the shift
    if settings["sampling"] == "uniform":
        expected = back
    elif settings["sampling"] == "logit_normal":
        z = (np.log(back / (1 - back)) - 0.5) / 1.5
        expected = torch.special.ndtr(torch.from_numpy(z)).numpy()
    else:  # the map from u falls from 1 to 0, so P(level < t) = 1 - u(t), found by bisection
        low, high = np.zeros(9), np.ones(9)
        for _ in range(60):
            u = (low + high) / 2
            above = 1 - u - settings["mode_scale"] * (np.cos(np.pi / 2 * u) ** 2 - 1 + u) > back
            low, high = np.where(above, u, low), np.where(above, high, u)
        expected = 1 - low
    assert np.abs([(draws < t).mean() for t in grid] - expected).max() < 0.01
    assert draws.min() >= 0 and draws.max() <= 1


def test_levels_of_few_steps_are_those_of_sampling() -> None:
    """What the network is asked at in training is what it is asked at by the sampler of the same list."""
    draws = method(Line(), 5.0, sampling="steps", steps=[1000, 300, 60]).levels(9000, step_generator(0, 1))
    run = FewStepRun(FewStepSchedule.make([1000, 300, 60], 5.0, warp=True), NoiseSource([0]))
    levels, counts = draws.unique(return_counts=True)
    assert levels.tolist() == run.sigmas[2::-1] and (levels * 1000).tolist() == pytest.approx(run.times[::-1])
    assert (counts / 9000 - 1 / 3).abs().max() < 0.02


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_min_snr_is_the_same_for_every_prediction(prediction: Any) -> None:
    """In terms of the clean sample each squared error weighs min(snr, gamma)."""
    convention = Convention(prediction=prediction, interpolant="cosine")
    denoiser = Denoiser(SimpleNamespace(), convention)  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(2)
    x0, noise, wrong = (randn((6, 2, 1, 2, 2), draw) for _ in range(3))
    s = torch.tensor([0.05, 0.2, 0.4, 0.6, 0.8, 0.95])
    x, target = denoiser.add_noise(x0, noise, s), denoiser.target(x0, noise, s)
    own = (wrong - target).square().flatten(1).mean(1) * snr_weight(convention, s, 5.0)
    clean = (denoiser.to_x0(wrong, x, s) - x0).square().flatten(1).mean(1)
    snr = (1 - s * s) / (s * s)
    torch.testing.assert_close(own, clean * snr.clamp(max=5.0), rtol=1e-4, atol=1e-5)


def test_settings_that_do_not_apply() -> None:
    with pytest.raises(ConfigError, match="predicts a flow"):
        method(Line(), min_snr=5.0)
    for settings in ({"sampling": "steps"}, {"steps": [1000]}):
        with pytest.raises(ValueError, match="steps are of sampling"):
            FinetuneSettings(name="finetune", **settings)
    other = SimpleNamespace(convention=Convention(prediction="epsilon", interpolant="cosine"))
    with pytest.raises(ConfigError, match="is for flow models; this one predicts 'epsilon'"):
        Finetune({"student": other}, FinetuneSettings(name="finetune", sampling="steps", steps=(1000,)))  # type: ignore[dict-item]


def test_lora_layers_are_a_change_of_weights() -> None:
    """At first nothing; then the network is that of W + alpha / r up down; gradients reach nothing else."""
    transformer, plain = tiny_causal(), tiny_causal()
    draw = torch.Generator().manual_seed(3)
    x, text = randn((1, TINY["in_channels"], 2, 4, 6), draw), randn((1, TEXT, TINY["text_dim"]), draw)
    call: Any = (x, torch.tensor([500.0]), text)
    with pytest.raises(ConfigError, match=r"lora\.targets nothing.*to_q"):
        LoraLayers(transformer, LoraSection(targets=("nothing",)), draw)
    layers = LoraLayers(transformer, LoraSection(rank=3, alpha=6.0, targets=("to_q", "ffn.net")), draw)
    assert torch.equal(transformer(*call), plain(*call))
    assert len(layers.pairs()) == 2 * 4 and sum(p.numel() > 0 for p in layers.parameters()) == 16
    for parameter in layers.parameters():
        parameter.data += 0.3 * randn(parameter.shape, draw)
    state = plain.state_dict()
    pairs = layers.pairs()
    for name, (down, up) in pairs.items():
        state[f"{name}.weight"] = state[f"{name}.weight"] + 2.0 * up @ down
        torch.testing.assert_close(layers.changes()[f"{name}.weight"], 2.0 * up @ down)
    out = transformer(*call)
    assert (out - plain(*call)).abs().max() > 1e-2
    plain.load_state_dict(state)
    torch.testing.assert_close(out, plain(*call), rtol=0, atol=2e-5)
    out.square().mean().backward()
    assert all(p.grad is None for p in transformer.parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layers.parameters())


def test_names_of_the_authors() -> None:
    assert authors_name("blocks.3.attn1.to_q") == "blocks.3.self_attn.q"
    assert authors_name("blocks.11.attn2.to_out.0") == "blocks.11.cross_attn.o"
    assert authors_name("blocks.0.ffn.net.0.proj") == "blocks.0.ffn.0"
    assert authors_name("transformer_blocks.0.attn.to_q") is None


def test_a_lora_goes_to_diffusers_comfyui_and_back(tmp_path: Path) -> None:
    """Train, export, load into diffusers' own pipeline: the latents of the trained model; and our own loader."""
    from diffusers import WanPipeline

    from kinetoscope import VideoGenerator

    model = make_tiny_wan(tmp_path / "model")
    lora = {"rank": 4, "alpha": 8.0}
    models = {"student": {"init_from": str(model), "trainable": True, "lora": lora}}
    optimizer = {"learning_rate": 0.05, "warmup": 0, "ema": 0.5}
    recipe = write_recipe(tmp_path / "a", model, models=models, optimizer=optimizer)
    out = run_post_recipe(recipe)
    assert sorted(f.name for f in out.iterdir()) == ["README.md", COMFYUI_FILE, "loss.png", DIFFUSERS_FILE]
    trainer = Trainer(load_post_recipe(recipe), tmp_path)
    trainer.load(load_checkpoint(out.parent / "checkpoints" / "step-00000003.pt"))
    trainer.learners[STUDENT].finish()
    student = trainer.roles[STUDENT].opened
    params: dict[str, Any] = {
        "height": 16, "width": 32, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 2.0,
    }  # fmt: skip
    ours = student.sample(["a red circle"], [7], **params).latents
    assert ours is not None
    oracle = WanPipeline.from_pretrained(model, torch_dtype=torch.float32)
    oracle.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"negative_prompt": "", "output_type": "latent", **params}
    before = oracle("a red circle", generator=torch.Generator().manual_seed(7), **call).frames
    oracle.load_lora_weights(out, weight_name=DIFFUSERS_FILE)
    theirs = oracle("a red circle", generator=torch.Generator().manual_seed(7), **call).frames
    assert (theirs - before).abs().max() > 1e-2, "training must show"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    with safe_open(out / DIFFUSERS_FILE, "pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
    assert told["transformer.r"] == 4 and told["transformer.lora_alpha"] == 8.0
    assert all(k.startswith("diffusion_model.blocks.") for k in load_file(out / COMFYUI_FILE))
    frames = {}
    for name in (DIFFUSERS_FILE, COMFYUI_FILE):
        gen = VideoGenerator.from_pretrained(model, device="cpu", dtype="float32", lora=str(out / name))
        loaded = next(iter(gen.loras.values()))
        assert loaded.unmatched == () and loaded.parameters == 20 and loaded.ranks == (4,)
        frames[name] = gen.generate_video("a red circle", seed=7, **params).frames.astype(int)
    sampled = student.sample(["a red circle"], [7], **params).frames
    assert sampled is not None
    assert np.array_equal(frames[DIFFUSERS_FILE], frames[COMFYUI_FILE])
    assert np.abs(frames[DIFFUSERS_FILE] - sampled[0].astype(int)).max() <= 1
