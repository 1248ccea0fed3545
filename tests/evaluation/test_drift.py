"""Drift: blocks of videos whose every frame is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kinetoscope.core.errors import InputError
from kinetoscope.evaluation.drift import block_spans, draw_drift, drift_json, drift_table, measure_drift
from kinetoscope.worlds import get_world

WORLD = get_world("shapes")


def test_spans() -> None:
    assert block_spans(33, 12) == [(0, 9), (9, 21), (21, 33)]
    assert block_spans(24, 12) == [(0, 12), (12, 24)]
    for frames, size in ((12, 12), (5, 12), (5, 0)):
        with pytest.raises(InputError, match="no two blocks"):
            block_spans(frames, size)


def test_the_block_in_which_colours_go_wrong(tmp_path: Path) -> None:
    """Of six videos two turn into another colour from frame 24 on, and one of them into nothing from frame 36 on."""
    red = [s for s in WORLD.captions() if s.colour == "red" and s.background != "blue"][::40][:6]
    blue = [replace(s, colour="blue") for s in red]
    videos = [WORLD.render(s, i, num_frames=48) for i, s in enumerate(red)]
    for i in (1, 4):
        videos[i][24:] = WORLD.render(blue[i], i, num_frames=48)[24:]
    videos[4][36:] = np.median(videos[4], axis=0).astype(np.uint8)
    drift = measure_drift(WORLD, red, videos, 12)
    assert [s.correct for s in drift.model["colour"]] == [6, 6, 4, 4]
    assert [s.correct for s in drift.model["background"]] == [6, 6, 6, 6]
    assert [s.correct for s in drift.model["shape"]][3] == 5 and "motion" not in drift.model
    assert all(s.value == 1 for s in drift.truth["colour"])
    together = drift.model["all correct"]
    assert together[2].correct <= 4 and together[0].correct >= 5
    table = drift_table(drift)
    assert "| colour | 1.000 | 0.667 | 0.667 | 1.000 |" in table and "frames 36-47" in table
    facts = json.loads(json.dumps(drift_json(drift)))
    assert facts["model"]["colour"] == pytest.approx([1, 1, 4 / 6, 4 / 6]) and facts["spans"][1] == [12, 24]
    draw_drift(drift, tmp_path / "drift.png")
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_to_read() -> None:
    spec = WORLD.captions()[0]

    class Blind:
        attributes = WORLD.attributes
        render = WORLD.render

        def judge(self, frames: np.ndarray) -> dict[str, None]:
            return dict.fromkeys(self.attributes)

    with pytest.raises(InputError, match="nothing can be read"):
        measure_drift(Blind(), [spec], [WORLD.render(spec, 0)], 11)
