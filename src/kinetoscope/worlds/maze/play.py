"""A maze that somebody else draws: a player who walks in it by sight, and a judge of whether it did as the player said.

Of a maze that a model imagines nobody knows the walls, so both go by what views show: the player chooses ways that look
free, and where a wall was in sight and in the way, having been stopped or having slid along it is right too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kinetoscope.worlds.base import Actions
from kinetoscope.worlds.maze.judge import Views, is_maze, read_views
from kinetoscope.worlds.maze.layout import SIDE, Maze
from kinetoscope.worlds.maze.motion import GAP, find_motion
from kinetoscope.worlds.maze.walk import MOUSE, MOVES, RADIUS, STEP, pressed, seen_motion, walk

Array = np.ndarray[Any, Any]

TOLERANCE = (8.0, 0.2)
"""Degrees and cells within which the judge reads motions of true walks."""
_ROUNDING = 1e-6  # of float32 actions, beside readings on a grid: 16.0000002 and 8 degrees are 8 apart
_REACH = RADIUS + 0.05  # how far before an agent a wall stops it, in cells
_HALF = RADIUS - 0.05  # how far beside its middle
_SEEN = 3  # columns that must show a wall for it to be there
_MEMORY = 8  # motions before (and, for who looks back, after) whose views tell of walls that are out of sight
_KNOWN = 0.25  # how near to a place a player must have been to know it, in cells
_TRIES = 3  # actions that a player thinks of, to take the one that looks best
_HOLD = (1, 2, 3, 4)  # blocks that an action lasts
_FIRST = 1  # actions of a stream change after frame 0, and then every so many blocks: motions are read from there on
_OPEN = Maze(np.zeros((SIDE, SIDE), bool), np.zeros((SIDE, SIDE, 4), np.uint8))


def _rotated(points: Array, degrees: float) -> Array:
    """[P, 2] ahead and to the right, for who looks so many degrees to the right of it."""
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return np.stack([points[:, 0] * c + points[:, 1] * s, points[:, 1] * c - points[:, 0] * s], axis=1)


def _moved(points: Array, motion: Array) -> Array:
    """Points [P, 2] seen after a motion (degrees, ahead and to the right along the middle heading)."""
    return _rotated(_rotated(points, motion[0] / 2) - motion[1:], motion[0] / 2)


def _unmoved(points: Array, motion: Array) -> Array:
    """Points [P, 2] seen before a motion; undoes `_moved`."""
    return _rotated(_rotated(points, -motion[0] / 2) + motion[1:], -motion[0] / 2)


def _walls(views: Views) -> list[Array]:
    """The points of wall [W, 2] that each view shows, in cells ahead and to the right."""
    return [np.stack([depth, depth * views.across], axis=1) for depth in views.depth]


def _inside(polygon: Array, place: Array) -> bool:
    """Whether a place [2] is within a polygon [P, 2]: a ray from it crosses the edges an odd number of times."""
    a, b = polygon - place, np.roll(polygon, -1, axis=0) - place
    crosses = (a[:, 1] > 0) != (b[:, 1] > 0)
    at = a[:, 0] - a[:, 1] * (b[:, 0] - a[:, 0]) / np.where(crosses, b[:, 1] - a[:, 1], 1)
    return bool((crosses & (at > 0)).sum() % 2)


def _in_the_way(walls: Array, way: Array) -> bool:
    """Whether points of wall [P, 2] stand where an agent would be on its way [2]."""
    length = float(np.hypot(*way))
    if not length:
        return False
    u = way / length
    along, beside = walls @ u, walls @ np.array([-u[1], u[0]])
    return int(((along > 0) & (along < length + _REACH) & (np.abs(beside) < _HALF)).sum()) >= _SEEN


class MazePlayer:
    """Who keeps doing something else: keys and turns are held for one to four blocks, and of a few random choices a
    player takes the one that has most room in what it has seen, a turn rather than none.

    Args:
        seed: of the choices.
    """

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng([seed, 0x706C6179])
        self._keys, self._turn, self._left = np.zeros(4, np.float32), np.zeros(2, np.float32), 0
        self._seen: list[Array] = []  # of each view where it was taken, and its walls [1 + W, 2], from where it is now

    def act(self, view: Array, frames: int) -> tuple[Array, Array]:
        """Keyboard [4] and mouse [2] of the next `frames` frames, having seen `view` uint8 [H, W, 3]."""
        walls = _walls(read_views(view[None]))[0]
        self._seen = [*self._seen[-_MEMORY:], np.concatenate([np.zeros((1, 2)), walls])]
        if not self._left or not self._free(self._keys, frames):
            self._choose(frames)
        self._left -= 1
        motion = _told(np.tile(self._keys, (frames + 1, 1)), np.tile(self._turn, (frames + 1, 1)))
        self._seen = [_moved(points, motion) for points in self._seen]
        return self._keys, self._turn

    def _choose(self, frames: int) -> None:
        """An action, and how many blocks of so many frames it lasts."""
        rng, weights, best = self._rng, np.array(list(MOVES.values())), -1.0
        for _ in range(_TRIES):
            keys = pressed(list(MOVES)[int(rng.choice(len(MOVES), p=weights / weights.sum()))])
            turn = np.array([0, rng.integers(-1, 2) * MOUSE], np.float32)
            blocks = int(rng.choice(_HOLD))
            free = self._free(keys, frames) + (keys.any() and self._free(keys, frames * blocks))
            gain = float(free) + (0.5 if turn[1] else 0.0) + float(rng.uniform(0, 0.7))
            if gain > best:
                best, self._keys, self._turn, self._left = gain, keys, turn, blocks

    def _free(self, keys: Array, frames: int) -> bool:
        """Whether it has been where the keys lead, or seen that there is room."""
        way = STEP * frames * np.array([keys[0] - keys[1], keys[3] - keys[2]])
        length = np.hypot(*way)
        if not length:
            return True
        if _in_the_way(np.concatenate([points[1:] for points in self._seen]), way):
            return False
        edge = way * (1 + _REACH / length)
        return any(np.hypot(*(p[0] - way)) < _KNOWN or _inside(p, edge) for p in self._seen)


@dataclass(frozen=True, eq=False)
class Motions:
    """What N parts of a walk, `GAP` frames each, show.

    Attributes:
        found: [N, 3] as `find_motion` reads them.
        walls: of each, the points of wall [P, 2] that views around it show, from where it begins and along its middle
            heading.
    """

    found: Array
    walls: list[Array]


def _told(keyboard: Array, mouse: Array) -> Array:
    """The motion [3] from the first to the last of some frames that their actions tell, were there no walls."""
    poses = walk(_OPEN, (SIDE / 2, SIDE / 2, 0.0), Actions(keyboard, mouse))
    return seen_motion(poses[[0, -1]])[0]


class PlayedMaze:
    """The maze as a world that is played (`worlds.base.PlayedWorld`)."""

    gap = GAP

    def player(self, seed: int) -> MazePlayer:
        """Who plays by sight."""
        return MazePlayer(seed)

    def is_view(self, frames: Array) -> Array:
        """Whether each of uint8 frames [T, H, W, 3] is a view of a maze (`worlds.maze.judge.is_maze`)."""
        return is_maze(frames)

    def read_motions(self, frames: Array) -> Motions:
        """The motions that uint8 views [T, H, W, 3] show, from the second view on."""
        views = read_views(frames[_FIRST:])
        found = find_motion(views)
        seen = _walls(views[: len(found) * GAP + 1 : GAP])
        walls: list[Array] = []
        for n, (turn, *_) in enumerate(found):
            first, last = max(0, n - _MEMORY), min(len(found), n + 1 + _MEMORY)
            past, future = seen[first][:0], seen[last][:0]
            for k in range(first, n):
                past = _moved(np.concatenate([past, seen[k]]), found[k])
            for k in range(last, n, -1):
                future = _unmoved(np.concatenate([future, seen[k]]), found[k - 1])
            walls.append(_rotated(np.concatenate([past, seen[n], future]), turn / 2))
        return Motions(found, walls)

    def told_motions(self, keyboard: Array, mouse: Array) -> Array:
        """The motions [N, 3] that keyboard [T, 4] and mouse [T, 2] of a walk tell, were there no walls."""
        count = max(0, (len(keyboard) - _FIRST - 1) // GAP)
        parts = [slice(_FIRST + n * GAP, _FIRST + (n + 1) * GAP + 1) for n in range(count)]
        return np.array([_told(keyboard[p], mouse[p]) for p in parts]).reshape(-1, 3)

    def followed(self, seen: Motions, told: Array) -> dict[str, Array]:
        """Whether each of N motions turned and went as it was told [N, 3]: "turn" and "way", bool [N] each.

        A turn is right within 8 degrees. A way is right within 0.2 cells (in both directions), and, where a wall is in
        the way, also if it is what a wall leaves of it: to slide along a wall is to go where the way's foot on some
        line is, which for all lines is the circle over the way.
        """
        degrees, cells = TOLERANCE
        ways, found = told[:, 1:], seen.found[:, 1:]
        free = (np.abs(found - ways) <= cells + _ROUNDING).all(1)
        left = np.hypot(*(found - ways / 2).T) <= np.hypot(*ways.T) / 2 + cells + _ROUNDING
        stopped = np.array([_in_the_way(walls, way) for walls, way in zip(seen.walls, ways, strict=True)], bool)
        return {
            "turn": np.abs(seen.found[:, 0] - told[:, 0]) <= degrees + _ROUNDING,
            "way": free | (left & stopped),
        }
