"""Run configurations: read, overridden, refused by name, and written from a video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from kinetoscope.cli import main
from kinetoscope.core.errors import ConfigError, InputError
from kinetoscope.media import read_metadata, read_video
from kinetoscope.runtime.run_config import RunConfig
from tiny import make_tiny_wan

OPTIONS = ["--frames", "9", "--seed", "1"]
SIZE = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture
def config(tiny: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    data = {
        "model": str(tiny), "prompt": "a red cat", "seed": 4, "output": str(tmp_path / "a.mp4"),
        "options": {"device": "cpu", "attention": "math"}, "sampling": SIZE,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(data))
    return path


def test_file_says_all_of_a_run(config: Path, tmp_path: Path) -> None:
    assert main(["generate", "--config", str(config)]) == 0
    record = read_metadata(tmp_path / "a.mp4")
    assert record["prompt"] == "a red cat" and record["seed"] == 4 and record["options"]["attention"] == "math"
    assert {k: record["params"][k] for k in SIZE} == SIZE


def test_options_stand_above_the_file_and_dotted_overrides_change_it(config: Path, tmp_path: Path) -> None:
    dotted = ["--set", "sampling.num_inference_steps=2", "--set", "options.attention=sdpa"]
    out = tmp_path / "b.mp4"
    assert main(["generate", "a blue cat", "--config", str(config), *dotted, *OPTIONS, "-o", str(out)]) == 0
    record = read_metadata(out)
    assert record["prompt"] == "a blue cat" and record["seed"] == 1 and record["options"]["attention"] == "sdpa"
    assert record["params"]["num_inference_steps"] == 2 and record["params"]["num_frames"] == 9
    assert not (tmp_path / "a.mp4").exists()


def test_dotted_override_works_without_a_file(tiny: Path, tmp_path: Path) -> None:
    out, size = tmp_path / "c.mp4", [x for k, v in SIZE.items() for x in ("--set", f"sampling.{k}={v}")]
    assert main(["generate", "a cat", "--model", str(tiny), "-o", str(out), *size]) == 0
    assert read_video(out)[0].shape == (5, 32, 32, 3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"modl": "x"}, r"unknown key 'modl'; did you mean model\? Known at the top: model, prompt"),
        ({"num_inference_steps": 3}, r"'num_inference_steps'; did you mean sampling.num_inference_steps\?"),
        ({"options": {"atention": "sdpa"}}, r"'options.atention'; did you mean options.attention\?"),
        ({"inputs": {"imag": "x"}}, r"'inputs.imag'; did you mean inputs.image\?"),
        ({"sampling": {"image": "x"}}, r"sampling.image is not a sampling parameter; write inputs.image"),
        ({"sampling": {"seed": 1}}, r"sampling.seed is not a sampling parameter; write seed"),
        ({"sampling": [1]}, r"sampling=\[1\] is not a section of keys"),
        ({"seed": "x"}, r"seed='x' is not a whole number"),
        ({"prompt": 3}, r"prompt=3 is not text, or a list of texts"),
        ({"prompt": []}, r"prompt=\[\] is not text, or a list of texts"),
    ],
)
def test_wrong_key_is_refused_by_name(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        RunConfig.of(change, "run.yaml")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a\n", "should hold sections; it holds a list"),
        ("a: [\n", "is not valid YAML"),
        ("sampling: {num_inference_step: 3}\n", "did you mean num_inference_steps"),
        ("sampling: {num_inference_steps: many}\n", "num_inference_steps='many' is not a whole number"),
        ("seed: [1, 2]\nprompt: [a, b, c]\n", "3 prompts but 2 values for seed"),
    ],
)
def test_wrong_file_is_one_line(
    text: str, says: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert main(["generate", "--config", str(path), "--model", str(tiny), "-o", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
    assert main(["generate", "--config", str(tmp_path / "none.yaml")]) == 1
    assert "none.yaml cannot be read: No such file" in capsys.readouterr().err


def test_configuration_written_from_a_video_makes_it_again(
    config: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--config", str(config)]) == 0
    written, again = tmp_path / "written.yaml", tmp_path / "again.mp4"
    capsys.readouterr()
    assert main(["replay", str(tmp_path / "a.mp4"), "--write-config", str(written), "--model", str(tiny)]) == 0
    assert capsys.readouterr().out == f"{written}\n"
    assert main(["generate", "--config", str(written), "-o", str(again)]) == 0
    assert np.array_equal(read_video(again)[0], read_video(tmp_path / "a.mp4")[0])
    assert read_metadata(again)["frames_sha256"] == read_metadata(tmp_path / "a.mp4")["frames_sha256"]


def test_record_of_given_pictures_is_refused(config: Path, tmp_path: Path) -> None:
    assert main(["generate", "--config", str(config)]) == 0
    record = read_metadata(tmp_path / "a.mp4") | {"given": {"image": "0"}}
    with pytest.raises(InputError, match=r"a.mp4 was made with image of the request, which the file does not"):
        RunConfig.of_record(record, "a.mp4")


def test_configuration_of_the_recipes_is_read() -> None:
    found = RunConfig.read(Path(__file__).parents[2] / "recipes/generate.yaml", ["sampling.num_inference_steps=20"])
    assert found.model == "tiny-t2v" and found.sampling["num_inference_steps"] == 20
