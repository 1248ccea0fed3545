"""Runs a program on the pretend device in a process of its own, since the device is registered for a whole process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
LIMIT = 240.0
"""Seconds that the process of a quick test may take; it takes a tenth of them on a quiet machine."""


def made_in_a_process(call: str, folder: Path, what: str, limit: float = LIMIT) -> dict[str, Any]:
    """Return the JSON that a call writes to OUT; fail, naming `what`, where it takes more than `limit` seconds.

    Args:
        call: "module.function(...)" of a module of this folder; FOLDER and OUT are paths.
        folder: where the process may write.
    """
    out, paths = folder / "out.json", [str(TESTS), str(TESTS.parent)]
    code = (
        f"import sys; sys.path[:0] = {paths}\n"
        "from pathlib import Path\n"
        f"from device import {call.partition('.')[0]}\n"
        f"FOLDER, OUT = Path({str(folder)!r}), Path({str(out)!r})\n"
        f"{call}"
    )
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        pytest.fail(f"{what} took more than {limit:.0f} s on the pretend device")
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())
