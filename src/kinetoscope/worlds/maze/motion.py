"""How the eye moved from one view of a maze to another, from the two views alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kinetoscope.worlds.maze.judge import Views
from kinetoscope.worlds.maze.render import HALF_WALL, focal

Array = np.ndarray[Any, Any]

GAP = 4
"""Frames from one compared view to the next: motion is small beside blur within one frame, and large within four."""
_TURNS, _WAYS = 24.0, 0.6  # degrees and cells that are tried at most
_COARSE = (2.0, 0.12)  # degrees and cells between two tries
_FINE = (0.5, 0.03)
_REACH = (2.0, 0.12)  # of the fine tries around the best coarse one
_STILL = 0.01  # error that a motion of the full range must save, where views tell little


def _grid(turns: Array, ways: Array) -> Array:
    return np.stack(np.meshgrid(turns, ways, ways, indexing="ij"), -1).reshape(-1, 3).astype(np.float32)


def _steps(reach: float, size: float) -> Array:
    count = round(reach / size)
    return np.arange(-count, count + 1) * size


_FIRST = _grid(_steps(_TURNS, _COARSE[0]), _steps(_WAYS, _COARSE[1]))
_SECOND = _grid(_steps(_REACH[0], _FINE[0]), _steps(_REACH[1], _FINE[1]))


def find_motion(views: Views) -> Array:
    """The motions [N, 3] over each `GAP` frames of N * GAP + 1 (or some more) successive views: turn to the right in
    degrees, and ways ahead and to the right in cells, along the middle of the two headings (as `walk.seen_motion`). Up
    to 24 degrees and 0.6 cells.

    Close to a wall little of one view is left in the next, so the view in the middle between the two is asked too.
    """
    result = np.empty(((len(views.half) - 1) // GAP, 3))
    for n in range(len(result)):
        first, middle, last = (views[n * GAP + k : n * GAP + k + 1] for k in (0, GAP // 2, GAP))
        halves = ((first, middle, 0.5), (middle, last, 0.5))
        coarse = _FIRST[_errors(halves, _FIRST, 2).argmin()]
        fine = coarse + _SECOND
        result[n] = fine[_errors((*halves, (first, last, 1.0)), fine, 1).argmin()]
    return result


def _errors(pairs: Sequence[tuple[Views, Views, float]], motions: Array, stride: int) -> Array:
    """How badly each of the motions [N, 3] fits pairs of views, between which lies a part of the motion."""
    total = _STILL * (np.abs(motions) / np.array((_TURNS, _WAYS, _WAYS), np.float32)).sum(1)
    for before, after, part in pairs:
        total = total + _one_way(before, after, part * motions, stride)
        total = total + _one_way(after, before, -part * motions, stride)  # about the middle heading, back is minus
    return total


def _one_way(before: Views, after: Views, motions: Array, stride: int) -> Array:
    """Mean over the points of wall in every so many columns of `before` of how little `after` shows them where the
    motion takes them."""
    f, width = np.float32(focal(before.height)), before.half.shape[1]
    ahead = before.depth[0, ::stride].astype(np.float32)  # [W]
    aside = ahead * before.across[::stride].astype(np.float32)
    angle = np.deg2rad(motions[:, :1] / 2)
    c, s = np.cos(angle), np.sin(angle)
    x = ahead * c + aside * s - motions[:, 1:2]  # [N, W] ahead and aside along the middle heading, from the new place
    y = aside * c - ahead * s - motions[:, 2:]
    x, y = x * c + y * s, y * c - x * s
    seen = x > 0.1
    x = np.where(seen, x, np.float32(1))
    place = f * y / x + np.float32(width / 2 - 0.5)  # column in `after`
    half = np.minimum(np.float32(HALF_WALL) * f / x, np.float32(before.height / 2 + 1.5))
    seen &= (place > -0.5) & (place < width - 0.5)
    left = np.clip(np.floor(place), 0, width - 1).astype(np.int32)
    own, there = before.light[0, ::stride].astype(np.float32), after.light[0]
    colours = np.minimum(np.abs(own[:, None] - there).sum(-1) / np.float32(0.3), 1)  # [W, W']
    rows = np.arange(len(own))

    def misfit(column: Array) -> Array:
        """0 to 2: difference of heights, relative, and of colours."""
        heights = np.minimum(np.abs(half - after.half[0][column]) / (np.float32(0.75) + np.float32(0.12) * half), 1)
        return heights + colours[rows, column]

    best = np.minimum(misfit(left), misfit(np.minimum(left + 1, width - 1)))
    count = seen.sum(1)
    return (best * seen).sum(1) / np.maximum(count, 1) + (count < 0.3 * seen.shape[1])
