"""`kinetoscope eval` of a model that is played, from a directory to scores, plots and a card."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kinetoscope.cli.main import main
from kinetoscope.media import read_video
from kinetoscope.worlds.maze import MazeGame
from pipelines.test_matrix_game import make_world
from tiny import make_tiny_wan

ARGUMENTS = ("--n", "2", "--seed", "5", "--size", "32x48", "--frames", "33", "--drift-frames", "8", "--steps", "3")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_world(tmp_path_factory.mktemp("world"), "base")
    (path / "kinetoscope.json").write_text(json.dumps({"world": "maze"}))
    return path


def test_a_model_of_no_training_is_played_and_scored(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [f"--{name}" if name == "card" else f"--{name}={tmp_path / file}" for name, file in
             (("json", "s.json"), ("sheet", "s.png"), ("drift", "d.png"), ("card", ""))]  # fmt: skip
    assert main(["eval", str(model), *ARGUMENTS, *files]) == 0
    told = capsys.readouterr().out
    assert "14 actions in 2 games of 33 frames in the world `maze`" in told
    assert "ground truth" in told and "shuffled actions" in told and "| frames 0-7 | frames 24-32 |" in told
    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores["n"] == 2 and scores["frames"] == 33 and scores["model"]["way"]["n"] == 14
    assert scores["ground truth"]["all correct"]["value"] > 0.8 > scores["model"]["all correct"]["value"]
    assert scores["drift"]["model"]["view"][-1] < 0.5 < scores["drift"]["ground truth"]["view"][-1]
    assert all((tmp_path / f"{n}.png").read_bytes().startswith(b"\x89PNG") for n in "sd")
    card = (model / "README.md").read_text()
    assert "--n 2 --seed 5 --size 32x48 --frames 33 --steps 3" in card and "| way |" in card


def test_worlds_and_models_that_do_not_go_together(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tiny_wan(tmp_path / "wan")
    assert main(["eval", str(tmp_path / "wan"), "--world", "maze", "--n", "1"]) == 1
    assert "takes no actions, and the world 'maze' is played" in capsys.readouterr().err
    assert main(["eval", str(model), "--world", "shapes", "--n", "1"]) == 1
    assert "is played block by block, and the world 'shapes' is described in words" in capsys.readouterr().err
    assert main(["eval", str(model), "--world", "moon", "--n", "1"]) == 1
    assert "moon" in capsys.readouterr().err
    assert main(["eval", str(model), *ARGUMENTS[:6], "--frames", "9", "--n", "1"]) == 1
    assert "--drift-frames" in capsys.readouterr().err


def test_a_script_plays_from_the_command_line(model: Path, tmp_path: Path) -> None:
    """`generate` and `stream` make the same video of a true first view and an action script."""
    Image.fromarray(MazeGame(32, 48).reset(3)).save(tmp_path / "first.png")
    script = [{"keys": ["w"], "repeat": 9}, {"keys": ["w"], "mouse": "right", "repeat": 12}]
    (tmp_path / "walk.json").write_text(json.dumps(script))
    given = ["--model", str(model), "--image", str(tmp_path / "first.png"), "--actions", str(tmp_path / "walk.json")]
    size = ["--size", "32x48", "--seed", "4"]
    assert main(["generate", *given, *size, "--frames", "21", "--output", str(tmp_path / "a.mp4")]) == 0
    assert main(["stream", *given, *size, "--blocks", "2", "--output", str(tmp_path / "b.mp4")]) == 0
    a, b = (read_video(tmp_path / f"{n}.mp4")[0] for n in "ab")
    assert len(a) == 21 and np.array_equal(a, b)
