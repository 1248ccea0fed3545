"""Trainings by two processes: the losses of one, checkpoints that either continues, and how a run may end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distributed.ranks import run_ranks
from distributed.trainings import Losses, all_told, broken, make_recipe, run, runs, told
from tiny import make_tiny_wan

pytestmark = pytest.mark.distributed

CASES = {
    "replicas=2": ("cfg=2", {"finetune": 50}),
    "replicas=2,fsdp=true": (
        "cfg=2,fsdp=true", {"finetune": 50, "lora": 5, "compiled": 5, "dmd2": 5, "self_forcing": 3},
    ),
    "ulysses=2": (
        "ulysses=2", {"finetune": 50, "compiled": 5, "dmd2": 5, "teacher_forcing": 3, "self_forcing": 3},
    ),
    "ring=2,fsdp=true": ("ring=2,fsdp=true", {"recomputed": 5}),
}  # fmt: skip
"""Layout of a recipe -> how the test's processes meet (who has micro-batches of its own stands along `cfg`), and the
steps that each kind of training is compared for."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_tiny_wan(tmp_path_factory.mktemp("tiny") / "model")
    (path / "kinetoscope.json").write_text(json.dumps({"world": "shapes", "defaults": {"num_inference_steps": 2}}))
    return path


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], tuple[Path, Losses]]:
    """(kind, steps) -> a recipe, and what one process tells."""
    folder = tmp_path_factory.mktemp("runs")
    wanted = {case for _, kinds in CASES.values() for case in kinds.items()}
    recipes = {(kind, steps): make_recipe(folder / kind, model, kind, steps) for kind, steps in wanted}
    return {case: (recipe, told(None, recipe)) for case, recipe in recipes.items()}


@pytest.mark.parametrize("layout", CASES)
def test_losses_are_those_of_one_process(layout: str, alone: dict[tuple[str, int], tuple[Path, Losses]]) -> None:
    """Within 1e-5 over five steps, and 1e-3 of themselves at the fiftieth; float32, of the same update."""
    meeting, kinds = CASES[layout]
    recipes = [alone[case][0] for case in kinds.items()]
    ranks = run_ranks(meeting, all_told, recipes, [f"parallel={layout}"], seconds=400)
    assert ranks[0] == ranks[1], "a loss is of the whole update, whoever tells it"
    for case, two in zip(kinds.items(), ranks[0], strict=True):
        one = alone[case][1]
        assert len(one) == len(two) == case[1] and one[0] != one[1]
        for step, (a, b) in enumerate(zip(one, two, strict=True)):
            assert a.keys() == b.keys()
            for name, value in a.items():
                allowed = 1e-5 if step < 5 else 1e-3 * abs(value)
                assert abs(value - b[name]) <= allowed, (case, step, name, value, b[name])


def weights(recipe: Path) -> dict[str, torch.Tensor]:
    return load_file(recipe.parent / "run" / "model" / "transformer" / "diffusion_pytorch_model.safetensors")


def checkpoints(recipe: Path) -> list[str]:
    return sorted(f.name for f in (recipe.parent / "run" / "checkpoints").iterdir())


def furthest(one: Path, other: Path) -> float:
    """The largest difference between two runs' models."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def test_a_run_is_stopped_and_goes_on_with_other_numbers_of_processes(model: Path, tmp_path: Path) -> None:
    """A signal to one process ends all after the same step; what they leave is continued by two, and by one."""
    every: dict[str, Any] = {"checkpoint": {"every": 1, "keep": 2}}
    one, two, again, fewer, more = (make_recipe(tmp_path / name, model, **every) for name in ("1", "2", "3", "4", "5"))
    assert run(None, one)[1] == "" and run(None, more, ["loop.steps=2"])[1] == ""
    (again.parent / "run/checkpoints/step-00000009.tmp").mkdir(parents=True)
    stopped = "tuned: stopped after step 3; run the same command to continue"
    first = run_ranks("cfg=2,fsdp=true", runs, [(two,), (again, [], (1, 3)), (fewer, [], (0, 3))], seconds=400)
    assert first[0] == [([1, 2, 3, 4, 5], ""), ([1, 2, 3], stopped), ([1, 2, 3], stopped)]
    assert first[1] == [([], ""), ([], stopped), ([], stopped)]
    assert checkpoints(two) == ["step-00000004", "step-00000005"]
    assert checkpoints(again) == checkpoints(fewer) == ["step-00000002", "step-00000003"]
    assert furthest(one, two) < 2e-5

    assert run(None, fewer) == ([4, 5], "")
    assert checkpoints(fewer) == ["step-00000004.pt", "step-00000005.pt"]
    assert run_ranks("cfg=2,fsdp=true", runs, [(again,), (more,)], seconds=400)[0] == [([4, 5], ""), ([3, 4, 5], "")]
    assert checkpoints(more) == ["step-00000004", "step-00000005"]
    assert furthest(two, again) == 0.0, "as if nothing had been"
    logs = [(r.parent / "run" / "log.jsonl").read_text() for r in (two, again)]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 5
    assert max(furthest(one, fewer), furthest(one, more)) < 2e-5


def test_a_process_that_fails_does_not_leave_the_other_waiting(model: Path, tmp_path: Path) -> None:
    said, failed = run_ranks("cfg=2", broken, make_recipe(tmp_path / "a", model), seconds=400)
    assert failed == "InputError: a file is gone"
    assert said.startswith("WorkerError: rank 0: another process of this training failed")


def test_the_command_by_torchrun(model: Path, tmp_path: Path) -> None:
    """One tells, judges and writes; the model is that of one process."""
    params = {"height": 16, "width": 32, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 2.0}
    sections: dict[str, Any] = {
        "callbacks": {"tensorboard": False, "validation": {"every": 2, "videos": 2, "params": params}}
    }
    one, two = (make_recipe(tmp_path / name, model, "finetune", 2, **sections) for name in ("one", "two"))
    assert run(None, one)[1] == ""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "kinetoscope", "train", str(two), "--set", "parallel.replicas=2", "--set", "parallel.fsdp=true"]
    done = subprocess.run([*launcher, *command], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    out = two.parent / "run"
    assert done.stdout.split() == [str(out / "model")]
    assert furthest(one, two) < 2e-5
    assert "on each of 2 ranks (replicas=2,fsdp=true)" in (out / "model" / "README.md").read_text()
    judged = [(r.parent / "run" / "validation.jsonl").read_text() for r in (one, two)]
    assert judged[0] == judged[1] and len(judged[0].splitlines()) == 1
