"""The command line as a process: Ctrl-C, a pipe that closes, and what starting it imports."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from tiny import make_tiny_wan

COMMAND = [sys.executable, "-m", "kinetoscope"]


def test_ctrl_c_in_the_middle_leaves_no_file(tmp_path: Path) -> None:
    model, out = make_tiny_wan(tmp_path / "model"), tmp_path / "out"
    argv = ["generate", "a cat", "--model", str(model), "--size", "64x64", "--frames", "17", "--steps", "1000"]
    interrupt = (  # Ctrl-C arrives in the middle of the denoising, at a known step
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored where the tests run in the background
        "from kinetoscope.cli import main, progress\n"
        "def event(self, event, plain=progress.RunProgress.event):\n"
        "    plain(self, event)\n"
        "    if event.kind == 'step' and event.step.index == 3:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "progress.RunProgress.event = event\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", interrupt, *argv, "-o", str(out), "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.splitlines()[-1] == "cancelled"  # a slow machine has told of a step before
    assert not out.exists()


def test_an_error_is_one_line_of_stderr(tmp_path: Path) -> None:
    command = [*COMMAND, "generate", "a cat", "--model", str(tmp_path / "none"), "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_goes_away_is_no_crash() -> None:
    process = subprocess.Popen([*COMMAND, "models"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=120) != -signal.SIGPIPE


def test_help_imports_nothing_heavy() -> None:
    program = "import sys, kinetoscope.cli; print([m for m in ('torch', 'numpy', 'rich', 'av') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
