"""Who walks in a maze: how actions move an agent, and a restless one's actions."""

from __future__ import annotations

from typing import Any

import numpy as np

from kinetoscope.worlds.base import Actions
from kinetoscope.worlds.maze.layout import Maze

Array = np.ndarray[Any, Any]

KEYS = ("forward", "back", "left", "right")
STEP = 0.1
"""Way of a pressed key in a frame, in cells."""
TURN = float(np.deg2rad(40.0))
"""Turn of a frame at mouse 1; the published demonstrations' 0.1 is 4 degrees."""
MOUSE = 0.1
"""Mouse of a restless agent that turns."""
RADIUS = 0.45
"""An agent keeps this far from walls, in cells."""

_HOLD = (4, 8, 12, 16)  # frames that an action lasts, so that it changes with the latent frames of a video model
MOVES = {"forward": 6, "back": 2, "left": 2, "right": 2, "forward left": 1, "forward right": 1, "": 2,
         "back left": 0.5, "back right": 0.5}  # fmt: skip
"""Keys that are pressed together, and how often a restless agent does."""
_TRIES = 3  # actions that a restless agent thinks of, to take the one that walls least hinder


def pressed(keys: str) -> Array:
    """The keyboard [4] with these keys down."""
    return np.array([float(k in keys.split()) for k in KEYS], np.float32)


def _free(maze: Maze, x: float, y: float) -> bool:
    """Whether no wall is nearer than the radius (measured along the axes)."""
    walls = maze.walls
    top, bottom, left, right = int(y - RADIUS), int(y + RADIUS), int(x - RADIUS), int(x + RADIUS)
    return not (walls[top, left] or walls[top, right] or walls[bottom, left] or walls[bottom, right])


def step(maze: Maze, pose: tuple[float, float, float], keys: Array, mouse: Array) -> tuple[float, float, float]:
    """The pose (x, y, heading) one frame later.

    First the agent turns, then it moves; where a wall is in the way of one axis of the map it slides along the other,
    up to the distance that it keeps.
    """
    x, y, heading = pose
    heading += TURN * float(mouse[1])
    ahead, aside = float(keys[0] - keys[1]) * STEP, float(keys[3] - keys[2]) * STEP
    c, s = float(np.cos(heading)), float(np.sin(heading))
    x = _slide(maze, x, y, ahead * c - aside * s, True)
    y = _slide(maze, y, x, ahead * s + aside * c, False)
    return x, y, heading


def _slide(maze: Maze, along: float, across: float, way: float, is_x: bool) -> float:
    """The new coordinate after a move along one axis; a wall in the way is touched, not crossed."""
    new = along + way
    if way == 0 or (_free(maze, new, across) if is_x else _free(maze, across, new)):
        return new
    near = np.floor(new + RADIUS) - RADIUS - 1e-6 if way > 0 else np.ceil(new - RADIUS) + RADIUS + 1e-6
    return max(along, float(near)) if way > 0 else min(along, float(near))


def start(maze: Maze, rng: np.random.Generator) -> tuple[float, float, float]:
    """A random place and heading."""
    places = maze.free
    row, column = places[int(rng.integers(len(places)))]
    room = 0.5 - RADIUS - 0.02
    dx, dy = rng.uniform(-room, room, 2)
    return float(column + 0.5 + dx), float(row + 0.5 + dy), float(rng.uniform(0, 2 * np.pi))


def walk(maze: Maze, pose: tuple[float, float, float], actions: Actions) -> Array:
    """Poses [T, 3] of every frame. Frame 0 shows `pose`; the action of frame t leads from it to frame t + 1, so that
    what the last frame's action does is not seen.

    So do the published Matrix-Game models read their actions: latent frame f shows the pixel frames 4 f - 3 to 4 f, and
    the last action of its window is that of frame 4 f - 1 (`nn.action.action_windows`).
    """
    poses = np.empty((len(actions.keyboard), 3))
    for t in range(len(poses)):
        poses[t] = pose
        pose = step(maze, pose, actions.keyboard[t], actions.mouse[t])
    return poses


def restless(maze: Maze, pose: tuple[float, float, float], frames: int, rng: np.random.Generator) -> Actions:
    """Actions of an agent that keeps doing something else: turns and keys are held for 4 to 16 frames, and of a few
    random choices it takes the one that walls least hinder, so that it runs into them now and then."""
    keyboard, mouse = np.zeros((frames, 4), np.float32), np.zeros((frames, 2), np.float32)
    weights, moves = np.array(list(MOVES.values())), [pressed(keys) for keys in MOVES]
    at = 0
    while at < frames:
        # The first action of a stream is one frame longer, as its first block is: so all change with the blocks.
        hold = min(int(rng.choice(_HOLD)) + (at == 0), frames - at)
        best: tuple[float, Any, Any, Any] | None = None
        for _ in range(_TRIES):
            keys = moves[int(rng.choice(len(moves), p=weights / weights.sum()))]
            turn = np.array([0, rng.integers(-1, 2) * MOUSE], np.float32)
            then, way = pose, 0.0
            for _ in range(hold):
                x, y, _ = then
                then = step(maze, then, keys, turn)
                way += float(np.hypot(then[0] - x, then[1] - y))
            asked = float(np.hypot(keys[0] - keys[1], keys[3] - keys[2])) * STEP * hold
            gain = (way / asked if asked else 1.0) + (0.3 if turn[1] else 0.0) + float(rng.uniform(0, 0.7))
            if best is None or gain > best[0]:
                best = gain, keys, turn, then
        assert best is not None
        _, keyboard[at : at + hold], mouse[at : at + hold], pose = best
        at += hold
    return Actions(keyboard, mouse)


def seen_motion(poses: Array) -> Array:
    """What an eye can see of a walk [T, 3]: float [T - 1, 3] of turn to the right in degrees, and ways ahead and to the
    right in cells, along the middle of the two headings."""
    way, turn = np.diff(poses[:, :2], axis=0), np.diff(poses[:, 2])
    middle = poses[:-1, 2] + turn / 2
    c, s = np.cos(middle), np.sin(middle)
    return np.stack([np.rad2deg(turn), way[:, 0] * c + way[:, 1] * s, way[:, 1] * c - way[:, 0] * s], axis=1)
