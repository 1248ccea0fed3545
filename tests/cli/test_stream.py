"""`kinetoscope stream`: what it writes is what the offline command makes, and an interrupted one leaves nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kinetoscope.cli import main
from kinetoscope.media import VideoWriter, read_metadata, read_video, write_video
from kinetoscope.runtime.replay import replay
from pipelines.test_causal_wan import make_directory, picture
from pipelines.test_matrix_game import make_world

SIZE = ["--size", "32x48", "--threads", "1", "--device", "cpu", "--dtype", "float32"]
RED = "a red circle moving left on black"


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_directory(tmp_path_factory.mktemp("causal"))


def test_stream_writes_the_offline_video(causal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "videos" / "s.mp4"
    argv = ["stream", RED, "--model", str(causal), "--blocks", "3", "--seed", "4", *SIZE, "-o", str(out)]
    assert main(argv) == 0
    told = capsys.readouterr()
    assert told.out == f"{out}  32x48, 33 frames, 3 blocks, seed 4\n"
    lines = told.err.splitlines()
    assert lines[0].startswith("ready after ")
    assert re.fullmatch(r"block 2 of 3: 12 frames in \d+\.\d\d s, \d+\.\d frames/s", lines[2]) and len(lines) == 4
    assert list(out.parent.iterdir()) == [out]

    whole = tmp_path / "whole.mp4"
    argv = ["generate", RED, "--model", str(causal), "--frames", "33", "--seed", "4", *SIZE, "-o", str(whole)]
    assert main(argv) == 0
    assert np.array_equal(read_video(out)[0], read_video(whole)[0])
    assert read_metadata(out) == read_metadata(whole), "it can be replayed as the same request"
    assert replay(out, model=str(causal)).identical


def test_stream_of_a_world(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = make_world(tmp_path / "model", "base"), tmp_path / "out.mp4"
    picture().save(tmp_path / "first.png")
    (tmp_path / "walk.json").write_text(json.dumps([{"keys": ["w"], "repeat": 21}]))
    argv = ["stream", "--model", str(model), *SIZE, "-o", str(out)]
    argv += ["--image", str(tmp_path / "first.png"), "--actions", str(tmp_path / "walk.json")]
    assert main([*argv, "--blocks", "3"]) == 1
    assert "lasts 21 frames; this video needs 33" in capsys.readouterr().err
    assert main([*argv, "--blocks", "2"]) == 0
    frames, fps = read_video(out)
    assert frames.shape == (21, 32, 48, 3) and fps == 25
    assert read_metadata(out)["params"]["extra"]["actions"]["frames"]


def test_ctrl_c_leaves_no_file(causal: Path, tmp_path: Path) -> None:
    interrupt = (  # Ctrl-C arrives when enough blocks are encoded for the file to be there
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored where the tests run in the background
        "from kinetoscope.cli import main\n"
        "from kinetoscope.runtime.session import Session\n"
        "def step(self, plain=Session.step):\n"
        "    if self.blocks == 6:\n"
        "        print(sorted(p.name for p in __import__('pathlib').Path(sys.argv[-1]).iterdir()), flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return plain(self)\n"
        "Session.step = step\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    out = tmp_path / "out"
    argv = ["stream", "a cat", "--model", str(causal), "--blocks", "7", *SIZE, "-o", str(out)]
    command = [sys.executable, "-c", interrupt, *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 130 and done.stderr.endswith("\ncancelled\n")
    assert re.fullmatch(r"\['\.[0-9a-f]+\.part'\]\n", done.stdout), "frames were on their way"
    assert list(out.iterdir()) == []


def test_refusals_of_stream(causal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["stream", "--model", str(causal), *SIZE, "-o", str(tmp_path / "x.mp4")]
    for more, words in (
        (["a cat", "--blocks", "0"], "blocks=0 is not a positive"),
        (["a cat", "--blocks", "8"], "set local_attn_size"),
        (["--blocks", "1"], "needs a prompt"),
        (["a cat", "--blocks", "1", "--video", "c.mp4"], "takes no video"),
    ):
        assert main([*argv, *more]) == 1
        assert words in capsys.readouterr().err
    assert (
        main([*argv, "a cat", "--blocks", "8", "--set", "local_attn_size=4", "--set", "dmd_denoising_steps=[9]"]) == 0
    )
    assert len(read_video(tmp_path / "x.mp4")[0]) == 93


def test_video_writer(tmp_path: Path) -> None:
    """The same packets as of a video that is written at once."""
    frames = np.random.default_rng(0).integers(0, 256, (20, 32, 48, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mp4", frames, 12, metadata={"x": 1})
    for metadata, name in (({"x": 1}, "b.mp4"), (None, "c.mp4")):
        with VideoWriter(tmp_path / name, 12) as writer:
            for part in np.split(frames, [3, 9]):
                writer.write(part)
            assert not (tmp_path / name).exists()
            writer.finish(metadata)
        got, fps = read_video(tmp_path / name)
        assert fps == 12 and np.array_equal(got, read_video(tmp_path / "a.mp4")[0])
    assert read_metadata(tmp_path / "b.mp4") == {"x": 1}
    with pytest.raises(ValueError, match="stop"), VideoWriter(tmp_path / "d.mp4", 12) as writer:
        writer.write(frames)
        raise ValueError("stop")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "b.mp4", "c.mp4"]
