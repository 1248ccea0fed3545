"""Sizes that only a decision may raise."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from kinetoscope.core.types import ForwardBatch

ROOT = Path(__file__).parents[2]


def test_files_stay_short() -> None:
    files = [f for part in ("src", "tests", "benchmarks", "lint") for f in (ROOT / part).rglob("*.py")]
    assert {f.name: n for f in files if (n := len(f.read_text().splitlines())) > 400} == {}


def test_forward_batch_stays_small() -> None:
    assert len(fields(ForwardBatch)) <= 30
