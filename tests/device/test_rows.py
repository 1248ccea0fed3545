"""Each row of `rows` on the pretend device: no mixed devices, no stalls in a step, and no more launches than recorded.

Rows run in a process of their own, since the pretend device is registered for a whole process. `launches.json` has the
largest number of launches of a step by row and dtype; when a change lowers it, write the lower number there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from device.processes import LIMIT, made_in_a_process
from device.rows import ROWS, SESSIONS

RECORDED = Path(__file__).parent / "launches.json"
SAME = 1e-5
"""Largest relative difference of float32 latents from those of the CPU, whose kernels are others."""
FRAMES = 1.5 / 255
"""Largest difference of the frames of a stream from those of the CPU."""
QUICK_FAMILIES = (
    *("wan", "wan-i2v", "wan-a14b", "wan-ti2v-image", "fast-wan", "causal", "skyreels-lag", "cosmos1-video"),
    *("cosmos2.5", "hunyuan", "hunyuan15", "ltx-i2v", "longcat-continued", "session-matrix-game"),
)
QUICK_OPTIONS = (
    *("solver-dpm++", "cache-fbcache", "cache-teacache", "guidance-cfg:cosine=0.99", "cfg-sequential", "two-prompts"),
    *("lora", "offload-blocks", "vae-tiled", "vae-streaming"),
)


def measured(names: Sequence[str], dtypes: Sequence[str], folder: Path, limit: float) -> dict[str, Any]:
    """Run rows in a process of their own; return what `rows.measure_rows` wrote."""
    call = f"rows.measure_rows({list(names)}, FOLDER, OUT, {list(dtypes)})"
    return made_in_a_process(call, folder, f"the rows {', '.join(names)}", limit)


def problems(name: str, row: dict[str, Any]) -> list[str]:
    """Say what a row does that it should not."""
    if "error" in row:
        return [f"{name}: {row['error']}"]
    known = json.loads(RECORDED.read_text())
    found = [f"{name}: tensors of two devices: {row['mixes']}"] if row["mixes"] else []
    for key in ("syncs", "copies", "reads", "decoding_copies"):
        if row.get(key, 0) > row["limits"].get(key, 0):
            found.append(f"{name}: {key}={row[key]}, at most {row['limits'].get(key, 0)}: {row['places']}")
    if row.get("difference", 0.0) > (FRAMES if name.startswith("session") else SAME):
        found.append(f"{name}: differs by {row['difference']:.2g} from the CPU")
    if torch.__version__.startswith(known["torch"]) and row["launches"] > known["launches"].get(name, 0):
        found.append(f"{name}: {row['launches']} launches a step, recorded are {known['launches'].get(name, 0)}")
    return found


def check(names: Sequence[str], dtypes: Sequence[str], folder: Path, limit: float = LIMIT) -> None:
    """Hold all rows to their bounds; the message names each that does not keep them."""
    rows = measured(names, dtypes, folder, limit)
    assert len(rows) == len(names) * len(dtypes)
    found = [problem for name, row in rows.items() for problem in problems(name, row)]
    assert not found, "\n".join(found)


def test_families_keep_their_bounds_on_a_device(tmp_path: Path) -> None:
    check(QUICK_FAMILIES, ["float32"], tmp_path)


def test_options_keep_their_bounds_on_a_device(tmp_path: Path) -> None:
    check(QUICK_OPTIONS, ["float32"], tmp_path)


@pytest.mark.slow
def test_every_row_keeps_its_bounds_on_a_device(tmp_path: Path) -> None:
    check([*ROWS, *SESSIONS], ["float32", "bfloat16"], tmp_path, 8 * LIMIT)
