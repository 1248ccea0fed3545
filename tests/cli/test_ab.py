"""`kinetoscope ab` on the command line: what is printed, written and returned."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kinetoscope import VideoGenerator
from kinetoscope.cli import ab, main
from kinetoscope.evaluation.compare import Thresholds
from kinetoscope.media import read_video, write_video
from tiny import make_tiny_wan

SMALL = ["--size", "32x32", "--frames", "5", "--steps", "2", "--device", "cpu", "--dtype", "float32", "--warmup", "0"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_wan(tmp_path_factory.mktemp("wan"))


def compare(tiny: Path, out: Path, *more: str) -> int:
    return main(["ab", "--model", str(tiny), "--prompt", "a red cat", "-o", str(out), *SMALL, *more])


def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text(), parse_constant=lambda token: pytest.fail(token))


def test_every_limit_has_an_option() -> None:
    assert {f.name for f in fields(Thresholds)} == set(ab._LIMITS)


def test_a_pass(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--a", "cfg=sequential", "--b", "cfg=batched", "--max-latent-diff", "1e-3", "--min-ssim", "0.9999")
    assert compare(tiny, tmp_path, "--keep-videos", *more) == 0
    told = capsys.readouterr().out
    assert "A  cfg=sequential" in told and "verdict: pass" in told and "denoising" in told and "peak memory" in told
    found = report(tmp_path)
    assert found["verdict"] == "pass" and found["a"] == "cfg=sequential" and found["seeds"] == [0]
    assert found["thresholds"] == {"min_ssim": 0.9999, "max_latent_diff": 1e-3}
    assert found["measures"]["ssim"]["worst"] >= 0.9999 and found["pairs"][0]["ms_ssim_scales"] == 2
    assert set(found["seconds"]) >= {"denoising", "decoding", "total"}
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    kept = [tmp_path / side / "000-a-red-cat-0.mp4" for side in "ab"]
    assert read_video(kept[0])[0].shape == (5, 32, 32, 3)
    assert main(["ab", "--videos", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(tmp_path / "again")]) == 0
    assert report(tmp_path / "again")["kind"] == "videos"


def test_a_no_op_says_equal(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(tiny, tmp_path, "--b", "", "--min-ssim", "1", "--min-psnr", "100") == 0
    assert "equal" in capsys.readouterr().out
    found = report(tmp_path)
    assert found["pairs"][0]["identical"] is True and found["measures"]["psnr"]["worst"] is None


def test_a_fail_is_1_and_still_has_its_report(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(tiny, tmp_path, "--b", "guidance_scale=9", "--min-ssim", "0.99999", "--max-slowdown", "0.001") == 1
    told = capsys.readouterr().out
    assert "is below 0.99999" in told and "slowdown" in told and "verdict: fail" in told
    assert len(report(tmp_path)["failures"]) == 2 and (tmp_path / "report.html").exists()


def test_interrupted_leaves_nothing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    generate = VideoGenerator.generate_video

    def interrupted(self: VideoGenerator, *args: Any, **fields: Any) -> Any:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(1)
        return generate(self, *args, **fields)

    monkeypatch.setattr(VideoGenerator, "generate_video", interrupted)
    assert compare(tiny, tmp_path / "out", "--b", "cfg=batched", "--seeds", "0,1") == 130
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "--b"),
        (["--a", "cfg=batched"], "--b"),
        (["--b", "cfg=batched", "--videos", "x", "y"], "not both"),
        (["--b", "cgf=batched"], "did you mean 'cfg'"),
        (["--b", "cfg=sideways"], "sideways"),
        (["--b", "cfg=batched", "--prompt", "a", "--prompts-file", "x"], "not both"),
        (["--b", "cfg=batched", "--prompts-file", "/nowhere"], "/nowhere"),
        (["--b", "cfg=batched", "--model", "none"], "none"),
        (["--videos", "/nowhere/a", "/nowhere/b"], "/nowhere/a does not exist"),
        (["--videos", ".", ".", "--max-slowdown", "2"], "--max-slowdown is for two configurations"),
        (["--b", "cfg=batched", "--min-ssim", "nan"], "min_ssim"),
        (["--b", "cfg=batched", "-o", "/proc/nowhere"], "/proc"),
    ],
)
def test_errors_are_one_line(argv: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = [] if "-o" in argv else ["-o", str(tmp_path / "out")]
    assert main(["ab", *folder, *argv]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and says in err
    assert not (tmp_path / "out").exists()


def test_folders_with_a_broken_file_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for side in "ab":
        write_video(tmp_path / side / "0.mp4", np.zeros((3, 16, 16, 3), np.uint8), 8)
        (tmp_path / side / "1.mp4").write_bytes(b"")
    assert main(["ab", "--videos", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(tmp_path / "out")]) == 1
    assert "1.mp4" in capsys.readouterr().out and report(tmp_path / "out")["pairs"][1]["problem"]
