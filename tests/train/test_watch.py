"""Curves arrive where people watch: in TensorBoard's own files, and in what wandb is told."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from kinetoscope.train.post import load_post_recipe
from kinetoscope.train.post_run import run_post_recipe
from kinetoscope.train.watch import open_watchers
from tiny import make_tiny_wan
from train.post_runs import write_recipe

WANDB = """
import json
from pathlib import Path

class Run:
    def __init__(self, **given):
        self.file = Path(given["dir"]) / "wandb.txt"
        steps = given["config"]["loop"]["steps"]
        self.tell(mode=given["mode"], project=given["project"], name=given["name"], steps=steps)

    def tell(self, **values):
        with self.file.open("a") as file:
            file.write(json.dumps(values) + "\\n")

    def log(self, values, step):
        self.tell(step=step, **values)

    def finish(self):
        self.tell(finished=True)

init = Run
"""


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of that name is installed, which writes down what it is told."""
    (tmp_path / "site/wandb").mkdir(parents=True)
    (tmp_path / "site/wandb/__init__.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)


def told(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_both_by_default(tmp_path: Path, wandb: None) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    model = make_tiny_wan(tmp_path / "model")
    run = run_post_recipe(write_recipe(tmp_path / "a", model, callbacks={})).parent
    log = told(run, "log.jsonl")
    expected = {(row["step"], name): value for row in log for name, value in row.items() if name != "step"}
    assert len(log) == 3 and len({name for _, name in expected}) >= 2
    board = events.EventAccumulator(str(run / "tensorboard")).Reload()
    seen = {
        (point.step, name.replace("/", ".")): point.value
        for name in board.Tags()["scalars"] for point in board.Scalars(name)
    }  # fmt: skip
    assert seen == pytest.approx(expected, rel=1e-6)  # it keeps float32
    first, *rows, last = told(run, "wandb.txt")
    assert first == {"mode": "offline", "project": "kinetoscope", "name": "tuned", "steps": 3}
    assert {(row["step"], name): row[name] for row in rows for name in row if name != "step"} == expected
    assert last == {"finished": True}


def test_what_is_asked_for(tmp_path: Path, wandb: None) -> None:
    for asked, mode in ((True, "online"), (None, "offline"), (False, None)):
        recipe = write_recipe(tmp_path / "a", tmp_path, callbacks={"tensorboard": False, "wandb": asked})
        folder = tmp_path / str(asked)
        folder.mkdir()
        watchers = open_watchers(load_post_recipe(recipe), folder)
        assert len(watchers) == bool(mode)
        assert not mode or told(folder, "wandb.txt")[0]["mode"] == mode
