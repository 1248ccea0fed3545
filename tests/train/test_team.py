"""A training shared by several devices, as far as one process can tell: recipes, mistakes, who takes what."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.distributed.checkpoint import state_dict_loader

from kinetoscope.cli.main import main
from kinetoscope.core.config import Launch
from kinetoscope.core.errors import ConfigError, OutputError, WorkerError
from kinetoscope.parallel import ParallelConfig
from kinetoscope.train import team as teams
from kinetoscope.train.kept import KeptCheckpoints
from kinetoscope.train.methods.base import pace_of
from kinetoscope.train.post import load_post_recipe
from kinetoscope.train.post_run import run_post_recipe
from kinetoscope.train.team import Team, join_team, layout, whole
from kinetoscope.train.trainer import open_roles
from tiny import make_tiny_wan
from train.post_runs import write_recipe

ALONE = Team(torch.device("cpu"))


def test_the_section_is_a_layout_as_inferences(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tmp_path, parallel={"replicas": 2, "fsdp": True})
    assert load_post_recipe(recipe).parallel == ParallelConfig(replicas=2, fsdp=True)
    assert load_post_recipe(recipe, ["parallel=ulysses=2,ring=2"]).parallel == ParallelConfig(ulysses=2, ring=2)
    assert load_post_recipe(write_recipe(tmp_path, tmp_path)).parallel == ParallelConfig()
    shared = layout(ParallelConfig(replicas=4, ulysses=2, fsdp=True))
    assert shared == ParallelConfig(cfg=4, ulysses=2, fsdp=True) and shared.world == 8


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("parallel.replicas=3", r"replicas=3 cannot share the loop.accumulate=2 .*set loop.accumulate=3"),
        ("parallel.tp=2", r"parallel \(tp=2\): a training is shared by replicas, ulysses, ring and fsdp"),
        ("parallel.cfg=2", "a training is shared by"),
        ("parallel.replica=2", "unknown degree 'replica'; did you mean replicas"),
        ("parallel.ulysses=0", "ulysses=0 is not a positive"),
    ],
)
def test_mistakes_are_explained(tmp_path: Path, override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_post_recipe(write_recipe(tmp_path, tmp_path), [override])


def test_more_or_fewer_processes_than_the_layout_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path, tmp_path)
    with pytest.raises(ConfigError, match=r"\(replicas=2\) is a layout of 2 processes, and 1 run.*nproc-per-node 2 -m"):
        run_post_recipe(recipe, ["parallel.replicas=2"])
    monkeypatch.setattr(teams, "launch", lambda: Launch(1, 4, 1))
    with pytest.raises(ConfigError, match=r"\(one device\) is a layout of 1 .*4 run; set parallel.replicas"):
        run_post_recipe(recipe)
    assert not (tmp_path / "run").exists()


def test_a_model_from_nothing_is_made_by_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kinetoscope.core.config.launch", lambda: Launch(1, 2, 1))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "x"}))
    assert main(["train", str(path)]) == 1
    assert "several processes are for recipes of post-training" in capsys.readouterr().err


def test_every_micro_batch_is_taken_once() -> None:
    assert ALONE.micro_batches(4) == range(4)
    for size in (1, 2, 4):
        places: Any = [SimpleNamespace(cfg=SimpleNamespace(size=size, index=i)) for i in range(size)]
        taken = [list(replace(ALONE, groups=p).micro_batches(4)) for p in places]
        assert sorted(itertools.chain(*taken)) == [0, 1, 2, 3] and {len(t) for t in taken} == {4 // size}


def test_rollouts_of_an_update_are_of_one_length() -> None:
    """By the step and the role, so that they differ from update to update."""
    drawn = {(s, r): int(torch.randint(1000, (), generator=pace_of(s, r))) for s in range(20) for r in "ab"}
    assert all(int(torch.randint(1000, (), generator=pace_of(*key))) == value for key, value in drawn.items())
    assert len(set(drawn.values())) > 30


def test_a_process_alone_needs_no_other() -> None:
    layer = nn.Linear(3, 2)
    layer(torch.ones(1, 3)).sum().backward()
    before = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    assert ALONE.clip(layer, 0.5) == pytest.approx(float(torch.cat([g.flatten() for g in before]).norm()))
    after = torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None])
    assert float(after.norm()) == pytest.approx(0.5, rel=1e-4)
    assert ALONE.mean({"a": 0.1}) == {"a": 0.1} and ALONE.most(2) == 2 and ALONE.shard is None and ALONE.leads
    assert whole({"w": layer.weight}, kept=False) == {} and whole({"w": layer.weight}, kept=True)["w"] is layer.weight

    def fails() -> None:
        raise OutputError("no room")

    with pytest.raises(OutputError, match="no room"):
        ALONE.alone(fails)


def test_an_error_of_the_network_is_anothers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one of this process stays what it is."""
    monkeypatch.setattr(teams.dist, "new_group", lambda **_: None)
    place: Any = SimpleNamespace(rank=3, device=torch.device("cpu"))
    told = r"rank 3: another process of this training failed.*closed by peer"
    with pytest.raises(WorkerError, match=told), join_team(ParallelConfig(replicas=2), "cpu", place):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    with pytest.raises(RuntimeError, match="mine"), join_team(ParallelConfig(replicas=2), "cpu", place):
        raise RuntimeError("mine")


def test_a_causal_models_memory_does_not_go_around(tmp_path: Path) -> None:
    model = make_tiny_wan(tmp_path / "wan")
    sections = {"student": {"init_from": str(model), "trainable": True, "causal": {"num_frames_per_block": 1}}}
    recipe = load_post_recipe(write_recipe(tmp_path, model, models=sections, method={"name": "diffusion_forcing"}))
    one = SimpleNamespace(size=2, index=0, handle=None, name="ring", ranks=(0, 1))
    groups: Any = SimpleNamespace(sequence=one, ring=one, ulysses=one, config=ParallelConfig(ring=2), rank=0)
    team = replace(ALONE, groups=groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teams.dist, "broadcast_object_list", lambda *_, **__: None)
        with pytest.raises(ConfigError, match=r"models.student is causal.*ulysses in place of ring"):
            open_roles(recipe, team)


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "step-00000004").mkdir()
    kept = KeptCheckpoints(tmp_path, 2, ALONE, lambda: {"x": torch.zeros(2)})
    with pytest.raises(ConfigError, match=r"step-00000004 cannot be read .*delete it"):
        kept.load()

    def lost(*_: Any, **__: Any) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")

    monkeypatch.setattr(state_dict_loader, "load", lost)
    with pytest.raises(RuntimeError, match="closed by peer"):  # that is no reason to delete anything
        kept.load()
