"""The trainer of post-training: against a loop written out by hand, killed at any moment, exported and sampled."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from safetensors.torch import load_file

from kinetoscope.core.errors import ConfigError, RunCancelled
from kinetoscope.loading import directory, resolve
from kinetoscope.train import post
from kinetoscope.train.checkpoint import load_checkpoint
from kinetoscope.train.loop import Progress, learning_rate
from kinetoscope.train.plugins import Opened
from kinetoscope.train.post import STUDENT, load_post_recipe
from kinetoscope.train.post_run import run_post_recipe
from kinetoscope.train.trainer import Trainer
from tiny import make_tiny_wan
from train.post_runs import toy_sections, write_recipe


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_tiny_wan(tmp_path_factory.mktemp("tiny") / "model")
    (path / "kinetoscope.json").write_text(json.dumps({"world": "shapes", "defaults": {"num_inference_steps": 2}}))
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def test_steps_are_those_of_a_loop_by_hand(model: Path, tmp_path: Path) -> None:
    """Accumulation, clipping, schedule, AdamW and the average, with torch alone."""
    recipe = load_post_recipe(write_recipe(tmp_path / "a", model))
    trainer = Trainer(recipe, tmp_path)
    told = [trainer.step(step) for step in range(3)]
    oracle, section = Opened(str(model)), recipe.optimizer_of(STUDENT)
    role = oracle.role(trainable=True)
    role.init_preprocessors(oracle.encoder(), oracle.negative_prompt)
    method = type(trainer.method)({"student": role}, recipe.method)
    parameters = list(role.transformer.parameters())
    adamw = torch.optim.AdamW(parameters, lr=1.0, betas=section.betas, weight_decay=section.weight_decay)
    average = {k: v.clone() for k, v in role.transformer.state_dict().items()}
    for step in range(3):
        losses = []
        for micro in range(2):
            batch = trainer._batch(step, micro)
            generator = trainer._generator(step, micro, crc32(b"student"))
            losses.append(method.losses("student", batch, step, generator)["total"])
        mean = torch.stack(losses).mean()
        adamw.zero_grad()
        mean.backward()
        norm = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm()
        for p in parameters:
            if p.grad is not None:
                p.grad *= min(1.0, section.clip / float(norm))
        adamw.param_groups[0]["lr"] = learning_rate(section, step)
        adamw.step()
        decay = min(0.8, (1 + step) / (10 + step))
        for k, v in role.transformer.state_dict().items():
            average[k] = decay * average[k] + (1 - decay) * v
        assert told[step]["student.total"] == pytest.approx(float(mean.detach()), rel=1e-5)
        assert told[step]["student.grad_norm"] == pytest.approx(float(norm), rel=1e-4)
        assert norm > section.clip, "clipping was tested"
    state = role.transformer.state_dict()
    ours = trainer.learners[STUDENT]
    for name, value in ours.module.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=2e-4)
        torch.testing.assert_close(ours.average[name], average[name], rtol=0, atol=1e-4)
    with ours.averaged():
        assert torch.equal(ours.module.state_dict()["proj_out.weight"], ours.average["proj_out.weight"])
    assert not torch.equal(ours.module.state_dict()["proj_out.weight"], ours.average["proj_out.weight"])


def test_a_run_from_start_to_a_model_that_samples_as_it_did_in_training(model: Path, tmp_path: Path) -> None:
    from kinetoscope import VideoGenerator

    params: dict[str, Any] = {
        "height": 16, "width": 32, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 2.0,
    }  # fmt: skip
    sections = {
        "export": {"dtype": "float32", "defaults": {"num_inference_steps": 3}, "scheduler": {"flow_shift": 2.5}},
        "callbacks": {"tensorboard": False, "validation": {"every": 2, "videos": 2, "params": params}},
        "checkpoint": {"every": 1, "keep": 2},
    }
    recipe = write_recipe(tmp_path / "a", model, **sections)
    seen: list[Progress] = []
    out = run_post_recipe(recipe, on_progress=seen.append)
    run = out.parent
    assert [p.step for p in seen if p.task == "tuned"] == [1, 2, 3]
    assert sorted(f.name for f in (run / "checkpoints").iterdir()) == ["step-00000002.pt", "step-00000003.pt"]
    card = (out / "README.md").read_text()
    assert f"kinetoscope train {recipe}" in card and "method `finetune`" in card and (out / "loss.png").exists()
    told = json.loads((run / "validation.jsonl").read_text())
    assert told["step"] == 2 and told["videos"] == 2 and 0 <= told["all correct"] <= 1
    assert (run / "validation" / "step-00000002.png").exists()
    assert json.loads((out / "kinetoscope.json").read_text())["defaults"] == {"num_inference_steps": 3}
    assert json.loads((out / "scheduler" / "scheduler_config.json").read_text())["flow_shift"] == 2.5
    trainer = Trainer(load_post_recipe(recipe), run)
    found = load_checkpoint(run / "checkpoints" / "step-00000003.pt")
    assert found["step"] == 3
    trainer.load(found)
    student = trainer.roles[STUDENT].opened
    params |= {"flow_shift": 2.5}
    with trainer.learners[STUDENT].averaged():
        trained = student.transformer.state_dict()
        assert all(torch.equal(v, trained[k]) for k, v in weights(out).items())
        ours = student.sample(["a red circle"], [7], **params).frames
    theirs = VideoGenerator.from_pretrained(out, device="cpu", dtype="float32").generate_video(
        "a red circle", seed=7, **params
    )
    before = Opened(str(model)).sample(["a red circle"], [7], **params).frames
    assert ours is not None and before is not None
    assert abs(ours[0].astype(int) - theirs.frames.astype(int)).max() <= 1
    assert abs(ours[0].astype(int) - before[0].astype(int)).max() > 1, "training must show"


def test_an_export_leaves_out_what_an_embedded_model_has(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (directory, resolve, post):
        monkeypatch.setattr(module, "embedded_models", lambda: {"base": model})
    recipe = write_recipe(tmp_path, model, export={"share": "base", "scheduler": {"flow_shift": 2.5}})
    out = run_post_recipe(recipe, ["loop.steps=1"])
    shared = {"vae": "base", "text_encoder": "base", "tokenizer": "base"}
    assert json.loads((out / "kinetoscope.json").read_text())["shared"] == shared
    assert {f.name for f in out.iterdir() if f.is_dir()} == {"scheduler", "transformer"}
    assert Opened(str(out)).sample(["a red circle"], [7], height=16, width=32, num_frames=5).frames is not None
    with pytest.raises(ConfigError, match=r"export\.share.*'bare' is no embedded model: base"):
        run_post_recipe(recipe, ["loop.steps=1", "export.share=bare", f"output={tmp_path / 'b'}"])


def killed(recipe: Path, delay: float) -> bool:
    """Run a recipe in another process and kill it after `delay` seconds of steps; whether it was still running."""
    child = os.fork()  # with torch loaded already
    if not child:
        try:
            torch.set_num_threads(1)
            run_post_recipe(recipe)
        finally:
            os._exit(0)
    log = recipe.parent / "run" / "log.jsonl"
    lines = len(log.read_text().splitlines()) if log.exists() else 0
    while not (log.exists() and len(log.read_text().splitlines()) > lines):  # it has done a step of its own
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.005)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def check_kills(model: Path, folder: Path, steps: int, kills: int) -> None:
    """The same weights, averages, optimizers and log whether or not it was killed."""
    straight = write_recipe(folder / "straight", model, **toy_sections(model, steps))
    run_post_recipe(straight)
    broken = write_recipe(folder / "broken", model, **toy_sections(model, steps))
    moments = random.Random(5)
    struck = sum(killed(broken, moments.uniform(0, 0.3)) for _ in range(kills))
    assert struck == kills, "the run was over too soon"
    run_post_recipe(broken)
    a, b = (load_checkpoint(folder / n / f"run/checkpoints/step-{steps:08d}.pt") for n in ("straight", "broken"))
    assert a["roles"].keys() == {"student", "critic"}
    for role in a["roles"]:
        for part in ("module", "average"):
            one, other = (x["roles"][role][part] for x in (a, b))
            assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
        one, other = (x["roles"][role]["optimizer"]["state"] for x in (a, b))
        assert all(torch.equal(v, other[n][k]) for n, moments in one.items() for k, v in moments.items())
    one, other = (weights(folder / n / "run" / "model") for n in ("straight", "broken"))
    assert all(torch.equal(one[k], other[k]) for k in one)
    logs = [(folder / n / "run" / "log.jsonl").read_text().splitlines() for n in ("straight", "broken")]
    assert logs[0] == logs[1] and len(logs[0]) == steps
    rows = [json.loads(line) for line in logs[0]]
    assert ["student.total" in r for r in rows[:4]] == [False, True, False, True]
    assert all("critic.level" in r for r in rows)


def test_a_kill_changes_nothing(model: Path, tmp_path: Path) -> None:
    check_kills(model, tmp_path, steps=8, kills=1)


@pytest.mark.slow
def test_ten_kills_change_nothing(model: Path, tmp_path: Path) -> None:
    check_kills(model, tmp_path, steps=120, kills=10)


def test_a_signal_leaves_a_checkpoint(model: Path, tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    recipe = write_recipe(tmp_path / "a", model)
    with pytest.raises(RunCancelled, match="tuned: stopped after step 2; run the same command"):
        run_post_recipe(recipe, on_progress=interrupt)
    assert [f.name for f in (tmp_path / "a" / "run" / "checkpoints").iterdir()] == ["step-00000002.pt"]
    with pytest.raises(ConfigError, match="another optimizer"):
        run_post_recipe(recipe, ["optimizer.learning_rate=1.0"])
    with pytest.raises(ConfigError, match="already holds"):
        run_post_recipe(recipe, fresh=True)


def test_more_steps_continue_what_was(model: Path, tmp_path: Path) -> None:
    """Where rates are constant, steps may be added; the model of any checkpoint may be had before the end."""
    constant = {"optimizer": {"learning_rate": 0.01, "warmup": 2, "final_fraction": 1.0}}
    straight = run_post_recipe(write_recipe(tmp_path / "a", model, **constant))
    recipe = write_recipe(tmp_path / "b", model, **constant)
    with pytest.raises(ConfigError, match="no checkpoint yet"):
        run_post_recipe(recipe, ["loop.steps=1"], export_only=True)
    run_post_recipe(recipe, ["loop.steps=1"])
    (tmp_path / "b" / "run" / "checkpoints" / "step-00000009.tmp").write_bytes(b"torn")
    more = run_post_recipe(recipe)
    assert all(torch.equal(v, weights(straight)[k]) for k, v in weights(more).items())
    assert [f.name for f in sorted((more.parent / "checkpoints").iterdir())] == ["step-00000001.pt", "step-00000003.pt"]
    (more.parent / "checkpoints" / "step-00000003.pt").unlink()
    early = run_post_recipe(recipe, ["threads=1"], export_only=True)
    assert "- steps: 1," in (early / "README.md").read_text()
    assert not torch.equal(weights(early)["proj_out.weight"], weights(straight)["proj_out.weight"])
    falling = write_recipe(tmp_path / "c", model)
    run_post_recipe(falling, ["loop.steps=1"])
    with pytest.raises(ConfigError, match="another loop"):
        run_post_recipe(falling)


def test_curves_go_to_tensorboard_and_wandb(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through stand-ins for the two packages."""
    import sys
    from types import ModuleType

    board, bees, module = Writer(), Writer(), ModuleType("fake")
    module.SummaryWriter = lambda folder: board  # type: ignore[attr-defined]
    module.init = lambda **_: bees  # type: ignore[attr-defined]
    recipe = write_recipe(tmp_path / "a", model, callbacks={"tensorboard": True, "wandb": True}, loop={"steps": 2})
    for name, says in (("torch.utils.tensorboard", "tensorboard"), ("wandb", "wandb")):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ConfigError, match=f"pip install {says}"):
            run_post_recipe(recipe)
        monkeypatch.setitem(sys.modules, name, module)
    run_post_recipe(recipe)
    rows = [json.loads(line) for line in (tmp_path / "a" / "run" / "log.jsonl").read_text().splitlines()]
    expected = {(r["step"], k): v for r in rows for k, v in r.items() if k != "step"}
    assert {(s, k.replace("/", ".")): v for (s, k), v in board.seen.items()} == expected
    assert bees.seen == expected and board.closed == bees.closed == 1


class Writer:
    """Keeps what it is told, in the ways of either package."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, str], float] = {}
        self.closed = 0

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.seen[step, name] = value

    def log(self, values: dict[str, float], step: int) -> None:
        self.seen |= {(step, k): v for k, v in values.items()}

    def close(self) -> None:
        self.closed += 1

    finish = close


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("method.sampling=flat", "method.sampling"),
        ("method.captiondropout=0.1", "unknown key method.captiondropout; did you mean caption_dropout"),
        ("method={name: nothing}", "unknown method 'nothing'.*finetune"),
        ("method=finetune", "method should be a section with name"),
        ("data.source=tape", "unknown data source 'tape'.*world"),
        ("data.clips=0", "data.clips"),
        ("models.student.trainable=false", "student that is trainable"),
        ("models.student.lora={rank: 0}", "rank"),
        ("loop.step=3", "unknown key loop.step; did you mean steps"),
        ("precision=bfloat16", "unknown key precision; did you mean loop.precision"),
        ("models.other={init_from: x, lora: {}}", "models.other has a lora but is not trainable"),
        ("models.other={init_from: x, checkpointing: true}", "models.other has checkpointing but is not trainable"),
        ("models.other={init_from: x, optimizer: {learning_rate: 1}}", "models.other has an optimizer but is not"),
        ("models.other={init_from: x}", r"finetune does not use models\.other; leave it out \(its roles are: student"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas"),
        ("export.defaults.steps=4", "unknown sampling parameter steps; .*num_inference_steps"),
        ("callbacks.validation={every: 1, params: {size: 4}}", "unknown sampling parameter size"),
        ("method.mode_scale=1.0", "mode_scale=1.0 has no effect without sampling=mode"),
        ("method={name: finetune, sampling: uniform, logit_std: 2}", "logit_std=2.0 has no effect without sampling="),
        ("data.whitening=0.5", "whitening=0.5 has no effect without latents=basis"),
        ("data.latents=none", "data.source=world gives prompts without latents, and method finetune learns from"),
    ],
)
def test_recipe_mistakes_are_explained(tmp_path: Path, override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_post_recipe(write_recipe(tmp_path, tmp_path), [override])


def test_roles_and_methods_that_do_not_go_together(model: Path, tmp_path: Path) -> None:
    sections = toy_sections(model, 2)
    missing = {"models": {k: v for k, v in sections["models"].items() if k != "teacher"}}
    with pytest.raises(ConfigError, match=r"method toy needs models\.teacher"):
        Trainer(load_post_recipe(write_recipe(tmp_path / "a", model, **sections | missing)), tmp_path)
    path = write_recipe(tmp_path / "b", model, **sections)
    for override, says in (
        ("models.critic.trainable=false", r"updates models\.critic; set its trainable"),
        (
            "loop.steps=1",
            r"models\.student is trainable, and method toy does not update it in any of the loop\.steps=1",
        ),
        ("models.teacher.trainable=true", r"models\.teacher is trainable, and method toy does not update it"),
    ):
        with pytest.raises(ConfigError, match=says):
            Trainer(load_post_recipe(path, [override]), tmp_path)
