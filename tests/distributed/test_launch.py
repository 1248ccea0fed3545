"""`torchrun -m kinetoscope generate`: every process is a rank, and one of them tells and writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kinetoscope import VideoGenerator
from kinetoscope.media import read_video
from tiny import make_tiny_wan

RED = "a red circle"


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["ulysses=2", "replicas=2"])
def test_generate(layout: str, tmp_path: Path) -> None:
    model = make_tiny_wan(tmp_path / "wan")
    here = VideoGenerator.from_pretrained(model, device="cpu")
    here.generate_video(
        [RED, RED], height=32, width=32, num_frames=5, num_inference_steps=3, seed=[0, 1], output_path=tmp_path / "here"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    asked = ["--size", "32x32", "--frames", "5", "--steps", "3", "--device", "cpu", "--parallel", layout]
    command = ["generate", RED, "--num-videos", "2", "--model", str(model), *asked]
    done = subprocess.run(
        [*launcher, "-m", "kinetoscope", *command, "--output", str(tmp_path / "out"), "--trace"],
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    files = sorted((tmp_path / "out").glob("*.mp4"))
    assert len(files) == 2 and len(list((tmp_path / "out").iterdir())) == 4  # and a trace each
    lines = done.stdout.splitlines()
    assert len([line for line in lines if ".mp4" in line]) == 2  # told once
    shown = {line.split()[0] for line in lines if ".mp4" in line}
    assert shown == {str(f) for f in files}
    expected = sorted((tmp_path / "here").glob("*.mp4"))
    assert [f.name for f in files] == [f.name for f in expected]
    for file, same, other in zip(files, expected, reversed(expected), strict=True):
        frames, right, wrong = (read_video(f)[0].astype(np.float32) for f in (file, same, other))
        assert np.abs(frames - right).mean() < 0.5 and np.abs(frames - wrong).mean() > 2
