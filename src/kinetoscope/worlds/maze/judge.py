"""Reads views of a maze from their pixels: is it a maze, and how did the eye move from one view to another?

No learning: each column of a view is compared with all columns that the renderer draws (ceiling, wall of some colour up
to some height, floor), which tells how far its wall is and what it looks like. A motion moves these points of wall to
places of the next view that can be computed, so the motion is found by trying.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from kinetoscope.core.errors import InputError
from kinetoscope.worlds.maze.render import HALF_WALL, KINDS, LIGHTS, backdrop, focal, shade

Array = np.ndarray[Any, Any]

MAZE = 0.75
"""Share of a view's columns that must be as the renderer draws them."""
_JUMPS = 0.12  # share of neighbouring columns between which the wall's height may jump; in a maze at most 0.05
_EXPLAINED = 10.0  # grey levels, root mean square over a column, up to which it is as the renderer draws it
_LEVELS = 0.5  # rows between two heights of walls that are told apart
_CHUNK = 64  # views read at once


@dataclass(frozen=True, eq=False)
class Views:
    """What the columns of views show.

    Attributes:
        half: float32 [T, W], rows from the middle of the view to the upper edge of the wall.
        light: float32 [T, W, 3], colour of the wall as it would be near by, in [0, 1].
        error: float32 [T, W], root mean square difference (grey levels) to the nearest column that the renderer draws.
        height: rows of the views.
    """

    half: Array
    light: Array
    error: Array
    height: int

    @property
    def depth(self) -> Array:
        """Distance of the walls along the line of sight, in cells [T, W]."""
        return HALF_WALL * focal(self.height) / self.half

    @property
    def across(self) -> Array:
        """How far to the right each column looks, at depth 1 [W]."""
        width = self.half.shape[1]
        return (np.arange(width) + 0.5 - width / 2) / focal(self.height)

    def __getitem__(self, part: slice | Array) -> Views:
        return Views(self.half[part], self.light[part], self.error[part], self.height)


@cache
def _columns(height: int) -> tuple[Array, Array, Array]:
    """All columns [K, 3 H] that are told apart, with their `half` [K] and `light` [K, 3]."""
    halves = np.arange(1.0, height / 2 + 2, _LEVELS)
    light = LIGHTS[list(KINDS)]  # [C, 3]
    away = np.abs(np.arange(height) - (height - 1) / 2)
    cover = np.clip(halves[:, None] + 0.5 - away, 0, 1)[:, None, :, None]  # [L, 1, H, 1]
    lit = light * shade(HALF_WALL * focal(height) / halves)[:, None, None]  # [L, C, 3]
    drawn = cover * lit[:, :, None] + (1 - cover) * backdrop(height)  # [L, C, H, 3]
    table = drawn.reshape(-1, 3 * height).astype(np.float32)
    return table, np.repeat(halves, len(light)).astype(np.float32), np.tile(light / 255, (len(halves), 1))


def read_views(frames: Array) -> Views:
    """What uint8 frames [T, H, W, 3] show.

    Raises InputError for an array of another kind or shape.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise InputError(f"the judge reads uint8 frames [T, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    count, height, width = frames.shape[:3]
    table, half, light = _columns(height)
    norm = np.square(table).sum(1)
    best, error = np.empty((count, width), np.int64), np.empty((count, width), np.float32)
    for start in range(0, count, _CHUNK):
        part = frames[start : start + _CHUNK].transpose(0, 2, 1, 3).reshape(-1, 3 * height).astype(np.float32)
        distance = norm - 2 * part @ table.T  # [T W, K], without the columns' own norm
        nearest = distance.argmin(1)
        least = distance[np.arange(len(part)), nearest] + np.square(part).sum(1)
        best[start : start + _CHUNK] = nearest.reshape(-1, width)
        error[start : start + _CHUNK] = np.sqrt(np.maximum(least, 0) / (3 * height)).reshape(-1, width)
    return Views(half[best], light[best], error, height)


def maze_share(views: Views) -> Array:
    """Share of each view's columns that are as the renderer draws them, [T]; 0 where they are in no order that walls
    could have."""
    a, b = views.half[:, 1:], views.half[:, :-1]
    jumps = (np.abs(a - b) > 1 + 0.15 * np.maximum(a, b)).mean(1)
    return np.where(jumps <= _JUMPS, (views.error < _EXPLAINED).mean(1), 0.0)


def is_maze(frames: Array) -> Array:
    """Whether each of uint8 frames [T, H, W, 3] is a view of a maze, bool [T]."""
    return maze_share(read_views(frames)) >= MAZE
