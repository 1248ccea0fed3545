"""A step of each training method on the pretend device, in a process of its own: see `training`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from device.processes import made_in_a_process
from device.training import METHODS

QUICK = ("finetune", "lora", "consistency", "dmd2", "self_forcing", "teacher_forcing")
SAME = 1e-5
"""Largest relative difference of losses and norms of gradients from those of the CPU."""


def check(names: Sequence[str], folder: Path) -> None:
    """Hold a step of each row to its bounds; the message names each that does not keep them."""
    found = made_in_a_process(f"training.measure_trainings({list(names)}, FOLDER, OUT)", folder, ", ".join(names))
    assert list(found) == list(names)
    problems: list[str] = []
    for name, row in found.items():
        if "error" in row:
            problems.append(f"{name}: {row['error']}")
            continue
        if row["mixes"]:
            problems.append(f"{name}: tensors of two devices: {row['mixes']}")
        if row["devices"] != ["pretend"]:
            problems.append(f"{name}: weights on {row['devices']}")
        if row["difference"] > SAME:
            problems.append(f"{name}: differs by {row['difference']:.2g} from the CPU: {row['values']}")
        reads = len(row["values"]) + 2  # each value that is told, and the lengths of the texts of both branches
        if sum(row["syncs"].values()) > reads:
            problems.append(f"{name}: more than {reads} reads in a step: {row['syncs']}")
    assert not problems, "\n".join(problems)


def test_a_training_step_is_that_of_the_cpu_on_a_device(tmp_path: Path) -> None:
    check(QUICK, tmp_path)


@pytest.mark.slow
def test_a_step_of_every_training_method_is_that_of_the_cpu_on_a_device(tmp_path: Path) -> None:
    check(list(METHODS), tmp_path)
