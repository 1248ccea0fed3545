"""The trainer: exact resume, recipes that explain their mistakes, a whole recipe in miniature that diffusers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from kinetoscope.core.errors import ConfigError, KinetoscopeError, RunCancelled
from kinetoscope.train.checkpoint import load_checkpoint, save_checkpoint
from kinetoscope.train.loop import Progress, learning_rate, step_generator, train
from kinetoscope.train.output_folder import OutputFolder
from kinetoscope.train.recipe import OptimizerSection, load_recipe
from kinetoscope.train.run import run_recipe
from kinetoscope.train.run_inputs import RunInputs
from kinetoscope.train.vae import build_vae, decode_unclamped

RECIPE = Path(__file__).parents[2] / "recipes" / "tiny_t2v.yaml"
SECTION = OptimizerSection(steps=6, learning_rate=0.05, warmup=2, ema=0.9)


class Line:
    """A toy task: fit y = 2 x."""

    name = "line"

    def __init__(self) -> None:
        self.module = nn.Linear(1, 1)
        nn.init.constant_(self.module.weight, 0.5)
        nn.init.zeros_(self.module.bias)

    def losses(self, step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        x = torch.empty(8, 1).uniform_(-1, 1, generator=generator)
        return {"total": (self.module(x) - 2 * x).square().mean()}


def run(folder: Path, on_progress: Any = None) -> dict[str, torch.Tensor]:
    task = Line()
    train(task, SECTION, folder, seed=3, checkpoint_minutes=1e-9, on_progress=on_progress)
    return task.module.state_dict()


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_resume_is_bit_exact(tmp_path: Path, stop: int) -> None:
    def kill(progress: Progress) -> None:
        if progress.step == stop + 1:
            raise RuntimeError("killed")  # after the update, before its checkpoint

    straight = run(tmp_path / "a")
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "b", kill)
    assert load_checkpoint(tmp_path / "b" / "line.pt")["step"] == stop
    resumed = run(tmp_path / "b")
    assert all(torch.equal(straight[k], resumed[k]) for k in straight)
    logs = [[json.loads(x) for x in (tmp_path / d / "line.jsonl").read_text().splitlines()] for d in "ab"]
    assert logs[0] == logs[1]
    assert [x["step"] for x in logs[0]] == [6]


def test_a_signal_leaves_a_checkpoint(tmp_path: Path) -> None:
    import os
    import signal

    def interrupt(progress: Progress) -> None:
        if progress.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(RunCancelled, match="after step 2"):
        run(tmp_path, interrupt)
    assert load_checkpoint(tmp_path / "line.pt")["step"] == 2


def test_a_finished_training_is_not_repeated(tmp_path: Path) -> None:
    first = run(tmp_path)
    seen: list[Progress] = []
    again = run(tmp_path, seen.append)
    assert seen == [] and all(torch.equal(first[k], again[k]) for k in first)


def test_a_loss_that_is_not_finite_stops(tmp_path: Path) -> None:
    class Broken(Line):
        def losses(self, step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
            return {"total": self.module.weight.sum() * float("nan")}

    with pytest.raises(KinetoscopeError, match="not finite"):
        train(Broken(), SECTION, tmp_path, seed=0, checkpoint_minutes=1)


def test_learning_rate_warms_up_and_decays() -> None:
    section = OptimizerSection(steps=100, learning_rate=1.0, warmup=10, final_fraction=0.1)
    rates = [learning_rate(section, s) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) <= 1.0
    assert rates[50] == pytest.approx(0.55) and rates[99] == pytest.approx(0.1, abs=1e-3)


def test_learning_rate_stays_at_its_last_value_after_the_schedule() -> None:
    section = OptimizerSection(steps=20, restarts=[10], learning_rate=1.0, warmup=4, final_fraction=0.25)
    assert [learning_rate(section, step) for step in (20, 21, 1000)] == [0.25] * 3
    assert learning_rate(section, 19) > 0.25
    never_warm = OptimizerSection(steps=3, learning_rate=1.0, warmup=8, final_fraction=0.5)
    assert learning_rate(never_warm, 3) == learning_rate(never_warm, 500) == 0.25


def test_a_restart_continues_a_finished_training() -> None:
    once = OptimizerSection(steps=100, learning_rate=1.0, warmup=10)
    longer = OptimizerSection(steps=160, restarts=[100], learning_rate=1.0, warmup=10)
    second = OptimizerSection(steps=60, learning_rate=1.0, warmup=10)
    expected = [learning_rate(once, s) for s in range(100)] + [learning_rate(second, s) for s in range(60)]
    assert [learning_rate(longer, s) for s in range(160)] == expected
    assert learning_rate(once.model_copy(update={"restarts": [100]}), 99) == expected[99]
    for wrong in ([50, 50], [90, 40]):
        with pytest.raises(ValueError, match="restarts must rise"):
            OptimizerSection(steps=160, restarts=wrong, learning_rate=1.0)


def test_noise_levels_begin_at_the_start() -> None:
    with pytest.raises(ConfigError, match="the first of levels must start at 0"):
        load_recipe(RECIPE, ["transformer.levels=[{start: 5}]"])


def test_steps_have_generators_of_their_own() -> None:
    draws = [torch.rand(4, generator=step_generator(0, s)) for s in (0, 1, 0)]
    assert torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[1])


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint(path, {"x": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ConfigError, match=r"a\.pt"):
        load_checkpoint(path)


def test_the_shipped_recipe_reads() -> None:
    recipe = load_recipe(RECIPE, ["transformer.optimizer.steps=7", "seed=4"])
    assert (recipe.transformer.optimizer.steps, recipe.seed, recipe.name) == (7, 4, "tiny-t2v")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("vae.encoder.optimizer.step=3", "did you mean steps"),
        ("seed=many", "seed"),
        ("transformer.clips=0", "transformer.clips"),
        ("nonsense", "section.key=value"),
        ("seed.x=1", "seed is a value"),
        ("vae.config=[", "not valid YAML"),
    ],
)
def test_recipe_mistakes_are_explained(override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_recipe(RECIPE, [override])


@pytest.mark.parametrize(("text", "says"), [("a: [", "valid YAML"), ("- 1", "sections"), (None, "cannot be read")])
def test_files_that_are_no_recipe(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "r.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        load_recipe(path)


@pytest.mark.parametrize("patch", [None, 2])
def test_unclamped_decode_is_the_vaes_own(patch: int | None) -> None:
    config: dict[str, Any] = {
        "base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1], "num_res_blocks": 1, "attn_scales": [],
        "temperal_downsample": [True, True],
    }  # fmt: skip
    if patch:
        config |= {"patch_size": patch, "in_channels": 3 * patch**2, "out_channels": 3 * patch**2}
    vae = build_vae(config, 0)
    z = torch.empty(2, 4, 3, 2, 2).normal_(generator=step_generator(0, 0))
    with torch.no_grad():
        ours, theirs = decode_unclamped(vae, z), vae.decode(z).sample
    assert torch.equal(ours.clamp(-1, 1), theirs)
    assert ours.abs().max() > 1  # so the clamp was tested


MINIATURE = {
    "output": None,
    "threads": 1,
    "vae.config": {
        "base_dim": 4, "dim_mult": [1, 1, 1], "num_res_blocks": 1, "attn_scales": [], "z_dim": 4,
        "temperal_downsample": [True, True], "patch_size": 2, "in_channels": 12, "out_channels": 12,
        "scale_factor_spatial": 8, "scale_factor_temporal": 4,
    },
    "vae.basis_clips": 2,
    "vae.encoder.optimizer.steps": 3,
    "vae.encoder.batches": [{"frames": 1, "batch": 2}, {"frames": 5, "batch": 1}],
    "vae.decoder.optimizer.steps": 3,
    "vae.decoder.batches": [{"frames": 5, "batch": 1}],
    "world.num_frames": 5, "world.height": 32, "world.width": 32,
    "text.optimizer.steps": 3, "text.batch": 4,
    "text.config": {"d_model": 16, "d_kv": 4, "num_heads": 4, "d_ff": 16, "num_layers": 1},
    "transformer.config": {
        "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 16, "freq_dim": 16,
        "text_dim": 16, "in_channels": 4, "out_channels": 4, "patch_size": [1, 2, 2],
    },
    "transformer.optimizer.steps": 4, "transformer.optimizer.restarts": [2], "transformer.clips": 4,
    "transformer.levels": [{}, {"start": 3, "shift": 2.0, "emphasis": 1.0}],
    "transformer.batches": [{"frames": 1, "batch": 4}, {"frames": 5, "batch": 2, "start": 2}],
    "defaults": {"height": 32, "width": 32, "num_frames": 5, "fps": 8, "num_inference_steps": 2, "guidance_scale": 2.0},
}  # fmt: skip


def miniature(output: Path) -> list[str]:
    values = MINIATURE | {"output": str(output)}
    return [f"{k}={yaml.safe_dump(v, default_flow_style=True).strip()}".replace("\n...", "") for k, v in values.items()]


def test_parts_side_by_side_make_the_same_model(tmp_path: Path) -> None:
    """Parts trained by themselves, in any order, and then finished: bit for bit the run in one go."""
    together, apart = tmp_path / "together", tmp_path / "apart"
    for parts in (["decoder"], ["transformer"], ["encoder"]):
        assert run_recipe(RECIPE, miniature(apart), parts=parts) == apart
    seen: list[str] = []
    run_recipe(RECIPE, miniature(apart), on_progress=lambda p: seen.append(p.task))
    assert seen == []
    run_recipe(RECIPE, miniature(together))
    for part in ("vae", "transformer"):
        file = f"model/{part}/diffusion_pytorch_model.safetensors"
        assert (together / file).read_bytes() == (apart / file).read_bytes()
    with pytest.raises(ConfigError, match="unknown part vae"):
        run_recipe(RECIPE, miniature(apart), parts=["vae"])
    too_long = [*miniature(tmp_path / "long"), "transformer.batches=[{frames: 9, batch: 1}]"]
    with pytest.raises(ConfigError, match=r"transformer\.batches: batches of 9 frames; use .* at most the 5 frames"):
        run_recipe(RECIPE, too_long, parts=["transformer"])


def test_a_recipe_from_start_to_finish(tmp_path: Path) -> None:
    from diffusers import WanPipeline

    from kinetoscope import VideoGenerator

    seen: list[str] = []
    overrides = miniature(tmp_path)
    model = run_recipe(RECIPE, overrides, on_progress=lambda p: seen.append(p.task))
    assert list(dict.fromkeys(seen)) == ["text", "encoder", "decoder", "latents", "transformer"]
    card = (model / "README.md").read_text()
    assert "kinetoscope train" in card and "PSNR" in card
    assert (model / "loss.png").read_bytes().startswith(b"\x89PNG")
    ours = VideoGenerator.from_pretrained(model, device="cpu").generate_video("a red circle moving left", seed=1)
    oracle = WanPipeline.from_pretrained(model, torch_dtype=torch.float32)
    oracle.set_progress_bar_config(disable=True)
    theirs = oracle(
        "a red circle moving left", "", 32, 32, 5, num_inference_steps=2, guidance_scale=2.0,
        generator=torch.Generator().manual_seed(1),
    ).frames[0]  # fmt: skip
    assert np.abs(ours.frames - theirs * 255.0).max() <= 1.0
    with pytest.raises(ConfigError, match="another seed"):
        run_recipe(RECIPE, [*overrides, "seed=1"])
    with pytest.raises(ConfigError, match="already holds"):
        run_recipe(RECIPE, overrides, fresh=True)


def test_a_run_from_before_a_setting_was_there(tmp_path: Path) -> None:
    """It is continued where the new setting is at its default, and refused where it is not."""
    recipe = load_recipe(RECIPE)
    inputs = RunInputs.read(tmp_path / "inputs.json")
    folder = OutputFolder(tmp_path, recipe, {"output"})
    folder.claim(inputs)
    file = tmp_path / "recipe.json"
    record = json.loads(file.read_text())
    del record["transformer"]["optimizer"]["betas"]
    file.write_text(json.dumps(record))
    chosen = load_recipe(RECIPE, ["transformer.optimizer.betas=[0.5, 0.9]"])
    with pytest.raises(ConfigError, match="another transformer"):
        OutputFolder(tmp_path, chosen, {"output"}).check()
    folder.check()
    folder.claim(inputs)
    assert "betas" in json.loads(file.read_text())["transformer"]["optimizer"]
