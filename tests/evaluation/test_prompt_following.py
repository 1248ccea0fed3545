"""Scores: their intervals, ground truth near one, shuffled captions at chance."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kinetoscope.core.errors import InputError
from kinetoscope.evaluation import Score, as_json, as_table, baselines, flicker, heldout_specs, prompt_following
from kinetoscope.evaluation.prompt_following import other_captions
from kinetoscope.worlds import get_world

WORLD = get_world("shapes")


def test_wilson_interval() -> None:
    """Against values of the published formula: 81 of 263 gives [0.2553, 0.3662] (Newcombe 1998, table I)."""
    assert Score(81, 263).interval == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert Score(10, 10).interval[1] == pytest.approx(1.0)
    assert Score(0, 20).interval == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_ground_truth_is_near_one_and_shuffled_is_chance() -> None:
    reports = baselines(WORLD, heldout_specs(WORLD, 60), seed=5)
    truth, shuffled = reports["ground truth"], reports["shuffled captions"]
    assert truth is not None and shuffled is not None
    assert all(s.value >= 0.98 for s in truth.values())
    for name, values in WORLD.attributes.items():
        low, high = shuffled[name].interval
        assert low - 0.05 <= 1 / len(values) <= high + 0.05
    assert shuffled["all correct"].value < 0.1


@pytest.mark.parametrize("count", [2, 3, 5])
def test_shuffled_captions_differ_from_the_clips_own(count: int) -> None:
    for seed in range(8):
        specs = heldout_specs(WORLD, count, seed)
        order = other_captions(specs, seed)
        assert order is not None and sorted(order) == list(range(count))
        assert all(specs[j] != specs[i] for i, j in enumerate(order))
    shuffled = baselines(WORLD, heldout_specs(WORLD, count, 0), 0, height=32, width=32)["shuffled captions"]
    assert shuffled is not None and shuffled["all correct"].value == 0


def test_shuffled_captions_of_equal_specs_are_swapped_with_others() -> None:
    a, b, c = WORLD.captions("heldout")[:3]
    for specs in ([a, a, b, b], [a, b, a, c, b, a], [a, a, a, b, c, b]):
        for seed in range(8):
            order = other_captions(specs, seed)
            assert order is not None and all(specs[j] != specs[i] for i, j in enumerate(order))
    for specs in ([], [a], [a, a], [a, a, b]):
        assert other_captions(specs) is None
    reports = baselines(WORLD, [a], height=32, width=32)
    assert reports["shuffled captions"] is None and as_json(None) is None
    assert "| n/a |" in as_table(reports)


def test_heldout_specs_were_never_trained_on() -> None:
    specs = heldout_specs(WORLD, 500, seed=1)
    assert not set(specs) & set(WORLD.captions("train"))
    assert heldout_specs(WORLD, 500, seed=1) == specs
    assert len(set(specs[: len(WORLD.captions("heldout"))])) == min(500, len(WORLD.captions("heldout")))


def test_reports_print() -> None:
    spec = WORLD.captions()[0]
    report = prompt_following(WORLD, [(spec, WORLD.render(spec, 0)), (spec, np.zeros((3, 64, 64, 3), np.uint8))])
    assert report["colour"] == Score(1, 2)
    assert json.loads(json.dumps(as_json(report)))["colour"]["value"] == 0.5
    assert "| colour | 0.500 [" in as_table({"model": report})
    with pytest.raises(InputError):
        prompt_following(WORLD, [])


def test_flicker() -> None:
    spec = next(s for s in WORLD.captions() if s.motion == "moving left")
    steady = WORLD.render(spec, 0)
    shaking = np.clip(steady.astype(int) + 6 * (np.arange(33) % 2)[:, None, None, None], 0, 255).astype(np.uint8)
    assert flicker(steady) == 0.0
    assert flicker(shaking) == pytest.approx(12, abs=4)
    with pytest.raises(InputError):
        flicker(steady[:2])
