"""Action scripts: what is pressed and where the camera turns, frame by frame, as JSON.

A script is a list of steps, or an object with the list under "frames" and, if wanted, the "layout" it was written for:

    {"layout": "universal", "frames": [
        {"keys": ["w"], "repeat": 9},
        {"keys": ["w", "a"], "mouse": [0.0, -0.1], "repeat": 12},
        {"keyboard": [1, 0, 0, 0], "mouse": "right"}
    ]}

A step says:

- "keys": names of pressed keys, or "keyboard": one number in [0, 1] for each key of the layout, in its order. Neither:
  nothing is pressed;
- "mouse": the camera's turn in the frame as [up, right], numbers in [-1, 1] (published demonstrations turn by 0.1),
  or a name of `CAMERA`. Left out: no turn. Only in layouts with a mouse;
- "repeat": pixel frames that it lasts, 1 if left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from kinetoscope.core.errors import InputError
from kinetoscope.core.files import read_text

TURN = 0.1
"""Camera turn of the published demonstrations."""
CAMERA: dict[str, tuple[float, float]] = {
    "up": (TURN, 0.0),
    "down": (-TURN, 0.0),
    "left": (0.0, -TURN),
    "right": (0.0, TURN),
    "up-left": (TURN, -TURN),
    "up-right": (TURN, TURN),
    "down-left": (-TURN, -TURN),
    "down-right": (-TURN, TURN),
    "still": (0.0, 0.0),
}
MAX_FRAMES = 1_000_000
STEP_FIELDS = ("keys", "keyboard", "mouse", "repeat")


@dataclass(frozen=True, slots=True)
class ActionLayout:
    """What the numbers of an action mean.

    Attributes:
        name: of the layout.
        keys: names of the keyboard values, in order; each may be written in full or by its letter.
        letters: a letter for each key.
        mouse: whether there is a camera to turn.
        rest: the key that means that nothing is done, for layouts where exactly one is always on; else None.
    """

    name: str
    keys: tuple[str, ...]
    letters: tuple[str, ...]
    mouse: bool = True
    rest: str | None = None

    def key(self, name: Any) -> int:
        """Place of a key.

        Raises:
            InputError: there is no such key.
        """
        for names in (self.letters, self.keys):
            if name in names:
                return names.index(name)
        known = ", ".join(f"{letter} ({key})" for letter, key in zip(self.letters, self.keys, strict=True))
        raise InputError(f"layout {self.name} has no key {name!r}; it has {known}")


LAYOUTS: dict[str, ActionLayout] = {  # Matrix-Game 2's published demonstrations (utils/conditions.py of its repository)
    layout.name: layout
    for layout in (
        ActionLayout("universal", ("forward", "back", "left", "right"), ("w", "s", "a", "d")),
        ActionLayout("gta_drive", ("forward", "back"), ("w", "s")),
        ActionLayout(
            "templerun",
            ("still", "jump", "slide", "turn-left", "turn-right", "left", "right"),
            ("q", "w", "s", "z", "c", "a", "d"),
            mouse=False,
            rest="still",
        ),
    )
}


@dataclass(frozen=True, slots=True, eq=False)
class ActionScript:
    """Actions of consecutive pixel frames.

    Attributes:
        layout: what the numbers mean.
        keyboard: float32 [P, K].
        mouse: float32 [P, 2] (up, right), or None in a layout without a mouse.
    """

    layout: ActionLayout
    keyboard: np.ndarray
    mouse: np.ndarray | None

    def __len__(self) -> int:
        return len(self.keyboard)

    def first(self, frames: int) -> ActionScript:
        """The first `frames` frames.

        Raises:
            InputError: the script is shorter.
        """
        if len(self) < frames:
            raise InputError(
                f"the action script lasts {len(self)} frames; this video needs {frames}: lengthen a repeat, add steps, "
                "or lower num_frames"
            )
        return ActionScript(self.layout, self.keyboard[:frames], None if self.mouse is None else self.mouse[:frames])

    def part(self, start: int, stop: int) -> ActionScript:
        """Frames [start, stop).

        Raises:
            InputError: the script is shorter.
        """
        script = self.first(stop)
        return ActionScript(
            self.layout, script.keyboard[start:], None if script.mouse is None else script.mouse[start:]
        )

    def to_json(self) -> dict[str, Any]:
        """The script as JSON values, equal steps joined; `parse_actions` reads it back to the same numbers."""
        steps: list[dict[str, Any]] = []
        for frame in range(len(self)):
            step: dict[str, Any] = {"keyboard": [float(v) for v in self.keyboard[frame]]}
            if self.mouse is not None:
                step["mouse"] = [float(v) for v in self.mouse[frame]]
            if steps and {**steps[-1], "repeat": 1} == {**step, "repeat": 1}:
                steps[-1]["repeat"] += 1
            else:
                steps.append(step | {"repeat": 1})
        return {"layout": self.layout.name, "frames": steps}


def load_actions(source: str | Path | Mapping[str, Any] | Sequence[Any], layout: str) -> ActionScript:
    """A script from a JSON file or from parsed JSON, for a model whose layout has the name `layout`.

    Raises:
        InputError: the file cannot be read, or see `parse_actions`.
    """
    if not isinstance(source, str | Path):
        return parse_actions(source, layout)
    try:
        value = json.loads(read_text(source, what="action script"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"action script {source} is not valid JSON: {error}") from error
    try:
        return parse_actions(value, layout)
    except InputError as error:
        raise InputError(f"action script {source}: {error}") from error


def parse_actions(value: Any, layout: str) -> ActionScript:
    """A script from parsed JSON (see the module), for a model whose layout has the name `layout`.

    Raises:
        InputError: names the step and what is wrong with it; or the script was written for another layout.
    """
    if layout not in LAYOUTS:
        raise InputError(f"unknown action layout {layout!r}; known: {', '.join(LAYOUTS)}")
    steps = value
    if isinstance(value, Mapping):
        script = cast("Mapping[str, Any]", value)
        if unknown := sorted(script.keys() - {"layout", "frames"}):
            raise InputError(f"an action script has the fields layout and frames; got {unknown}")
        written = script.get("layout", layout)
        if written != layout:
            raise InputError(f"the action script is for layout {written!r}; this model has {layout!r}")
        steps = script.get("frames")
    if not isinstance(steps, list | tuple) or not steps:
        raise InputError("an action script is a list of steps, or an object with that list under 'frames'; got none")
    own = LAYOUTS[layout]
    keyboard: list[list[float]] = []
    mouse: list[list[float]] = []
    for number, step in enumerate(cast("Sequence[Any]", steps)):
        try:
            keys, turn, repeat = _step(step, own)
            if len(keyboard) + repeat > MAX_FRAMES:
                raise InputError(f"the script would last more than {MAX_FRAMES} frames")
        except InputError as error:
            raise InputError(f"step {number}: {error}") from error
        keyboard += [keys] * repeat
        mouse += [turn] * repeat
    turns = np.asarray(mouse, dtype=np.float32) if own.mouse else None
    return ActionScript(own, np.asarray(keyboard, dtype=np.float32), turns)


def play(layout: str, frames: int, keyboard: Any = None, mouse: Any = None) -> ActionScript:
    """What a player does in the next `frames` frames.

    Args:
        layout: name of the layout.
        frames: P.
        keyboard: key names that are held (or one name); numbers in [0, 1], one a key [K] held or [P, K] frame by frame
            (list, array or tensor); None: nothing is pressed.
        mouse: a name of `CAMERA`; a turn [2] held or [P, 2] frame by frame; None: no turn.

    Raises:
        InputError: an unknown key, another shape, a number out of range, a mouse that the layout does not have.
    """
    if layout not in LAYOUTS:
        raise InputError(f"unknown action layout {layout!r}; known: {', '.join(LAYOUTS)}")
    own = LAYOUTS[layout]
    names: Any = [keyboard] if isinstance(keyboard, str) else [] if keyboard is None else keyboard
    if isinstance(names, list | tuple) and all(isinstance(n, str) for n in cast("Sequence[Any]", names)):
        keyboard = _pressed(names, own)
    keys = _table("keyboard", keyboard, frames, len(own.keys), 0.0)
    if not own.mouse:
        if mouse is not None:
            raise InputError(f"layout {layout} has no mouse")
        return ActionScript(own, keys, None)
    if isinstance(mouse, str) and mouse not in CAMERA:
        raise InputError(f"mouse={mouse!r} is no camera turn; known: {', '.join(CAMERA)}")
    turn = CAMERA[mouse or "still"] if mouse is None or isinstance(mouse, str) else mouse
    return ActionScript(own, keys, _table("mouse", turn, frames, 2, -1.0))


def _table(name: str, value: Any, frames: int, width: int, low: float) -> np.ndarray:
    """float32 [frames, width] of a value a frame, or of one for all frames."""
    value = value.detach().cpu() if hasattr(value, "detach") else value
    try:
        table = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}={value!r} is no table of numbers") from error
    if table.shape not in ((width,), (frames, width)):
        raise InputError(
            f"{name} has shape {list(table.shape)}; this block needs [{frames}, {width}], or [{width}] for all its "
            "frames"
        )
    if not (np.isfinite(table) & (table >= low) & (table <= 1)).all():
        raise InputError(f"{name} holds numbers outside [{low:g}, 1]")
    return np.broadcast_to(table, (frames, width)).copy()


def still(layout: str, frames: int) -> ActionScript:
    """A script in which nothing is done."""
    return parse_actions([{"repeat": frames}], layout)


def _step(step: Any, layout: ActionLayout) -> tuple[list[float], list[float], int]:
    """Keyboard values, camera turn and number of frames of one step."""
    if not isinstance(step, Mapping):
        raise InputError(f"should be an object with {', '.join(STEP_FIELDS)}; got {step!r}")
    fields = cast("Mapping[str, Any]", step)
    if unknown := sorted(str(k) for k in fields.keys() - set(STEP_FIELDS)):
        raise InputError(f"unknown fields {unknown}; a step has {', '.join(STEP_FIELDS)}")
    if "keys" in fields and "keyboard" in fields:
        raise InputError("says both keys and keyboard; give one of them")
    repeat = fields.get("repeat", 1)
    if type(repeat) is not int or repeat < 1:
        raise InputError(f"repeat={repeat!r} should be a positive whole number of frames")
    if "keyboard" in fields:
        keys = _numbers("keyboard", fields["keyboard"], len(layout.keys), 0.0)
    else:
        keys = _pressed(fields.get("keys", []), layout)
    turn = [0.0, 0.0]
    if fields.get("mouse") is not None:
        if not layout.mouse:
            raise InputError(f"layout {layout.name} has no mouse")
        given = fields["mouse"]
        if isinstance(given, str) and given not in CAMERA:
            raise InputError(f"mouse={given!r} is no camera turn; known: {', '.join(CAMERA)}")
        turn = list(CAMERA[given]) if isinstance(given, str) else _numbers("mouse", given, 2, -1.0)
    return keys, turn, repeat


def _pressed(names: Any, layout: ActionLayout) -> list[float]:
    if not isinstance(names, list | tuple):
        raise InputError(f"keys={names!r} should be a list of key names")
    places = {layout.key(name) for name in cast("Sequence[Any]", names)}
    if layout.rest is not None:
        if len(places) > 1:
            raise InputError(f"keys={names!r}: in layout {layout.name} one thing is done at a time")
        places = places or {layout.key(layout.rest)}
    return [float(place in places) for place in range(len(layout.keys))]


def _numbers(name: str, value: Any, count: int, low: float) -> list[float]:
    values: list[Any] = list(cast("Sequence[Any]", value)) if isinstance(value, list | tuple) else []
    if len(values) != count:
        raise InputError(f"{name}={value!r} should be a list of {count} numbers")
    for v in values:
        if type(v) not in (int, float) or not math.isfinite(v) or not low <= v <= 1:
            raise InputError(f"{name}={value!r}: {v!r} is not a number in [{low:g}, 1]")
    return [float(v) for v in values]
