"""Action scripts: what they mean, and what is refused in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kinetoscope.core.errors import InputError
from kinetoscope.media.actions import LAYOUTS, load_actions, parse_actions, still


def test_steps_and_repeats() -> None:
    script = parse_actions(
        {
            "layout": "universal",
            "frames": [
                {"keys": ["w", "left"], "repeat": 2},
                {"keyboard": [0, 1, 0, 0.5], "mouse": [0.25, -1]},
                {"mouse": "right"},
            ],
        },
        "universal",
    )
    assert script.keyboard.tolist() == [[1, 0, 1, 0], [1, 0, 1, 0], [0, 1, 0, 0.5], [0, 0, 0, 0]]
    assert script.mouse is not None
    np.testing.assert_allclose(script.mouse, [[0, 0], [0, 0], [0.25, -1], [0, 0.1]], rtol=1e-6)
    assert len(script.first(3)) == 3


def test_layouts_are_the_published_ones() -> None:
    assert {name: (len(layout.keys), layout.mouse) for name, layout in LAYOUTS.items()} == {
        "universal": (4, True),
        "gta_drive": (2, True),
        "templerun": (7, False),
    }
    pressed = [parse_actions([{"keys": [key]}], "templerun").keyboard[0].argmax() for key in "qwszcad"]
    assert pressed == list(range(7))


def test_where_one_thing_is_done_rest_is_a_key() -> None:
    script = still("templerun", 3)
    assert script.keyboard.tolist() == [[1, 0, 0, 0, 0, 0, 0]] * 3
    assert script.mouse is None
    assert not still("gta_drive", 2).keyboard.any()


def test_json_and_back() -> None:
    script = parse_actions([{"keys": ["s"], "mouse": "up-left", "repeat": 5}, {}], "gta_drive")
    again = parse_actions(json.loads(json.dumps(script.to_json())), "gta_drive")
    assert np.array_equal(again.keyboard, script.keyboard)
    assert again.mouse is not None and script.mouse is not None
    assert np.array_equal(again.mouse, script.mouse)
    assert [step["repeat"] for step in script.to_json()["frames"]] == [5, 1]


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "walk.json"
    file.write_text('[{"keys": ["w"], "repeat": 9}]')
    assert len(load_actions(file, "universal")) == 9
    file.write_text('[{"keys": ["w"], "repeat": 0}]')
    with pytest.raises(InputError, match=r"walk\.json: step 0: repeat=0"):
        load_actions(str(file), "universal")
    file.write_text("[{")
    with pytest.raises(InputError, match="not valid JSON"):
        load_actions(file, "universal")
    with pytest.raises(InputError, match="cannot be read"):
        load_actions(tmp_path / "none.json", "universal")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "list of steps"),
        ({"frames": "w"}, "list of steps"),
        ({"frames": [{}], "speed": 1}, "speed"),
        ({"layout": "templerun", "frames": [{}]}, "for layout 'templerun'"),
        (["w"], "step 0: should be an object"),
        ([{}, {"key": "w"}], r"step 1: unknown fields \['key'\]"),
        ([{"keys": "w"}], "list of key names"),
        ([{"keys": ["x"]}], r"no key 'x'; it has w \(forward\)"),
        ([{"keys": [["w"]]}], "no key"),
        ([{"keys": [], "keyboard": [0, 0, 0, 0]}], "both keys and keyboard"),
        ([{"keyboard": [0, 0]}], "list of 4 numbers"),
        ([{"keyboard": [0, 0, 0, 2]}], r"2 is not a number in \[0, 1\]"),
        ([{"keyboard": [0, 0, 0, True]}], "True is not a number"),
        ([{"mouse": [0, float("nan")]}], "nan is not a number"),
        ([{"mouse": "round"}], "no camera turn"),
        ([{"mouse": 0.1}], "list of 2 numbers"),
        ([{"repeat": 1.5}], "repeat=1.5"),
        ([{"repeat": 10**9}], "more than"),
    ],
)
def test_refuses(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_actions(value, "universal")


def test_refuses_what_a_layout_lacks() -> None:
    with pytest.raises(InputError, match="no mouse"):
        parse_actions([{"mouse": "up"}], "templerun")
    with pytest.raises(InputError, match="one thing is done"):
        parse_actions([{"keys": ["w", "a"]}], "templerun")
    with pytest.raises(InputError, match="unknown action layout"):
        parse_actions([{}], "chess")
    with pytest.raises(InputError, match="lasts 4 frames; this video needs 57"):
        still("universal", 4).first(57)
