"""Draws what is seen in a maze: one ray a column, walked from cell to cell (Amanatides and Woo, "A Fast Voxel Traversal
Algorithm for Ray Tracing", 1987), all columns of all frames at once.

The eye is at half the height of the walls, so that every picture's walls are symmetric about its middle row. x points
right and y down on the map; a heading of 0 looks along x, and headings grow to the right (clockwise on the map).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kinetoscope.worlds.maze.layout import Maze

Array = np.ndarray[Any, Any]

PALETTE = np.array([(215, 45, 40), (50, 175, 70), (55, 85, 225), (235, 200, 50), (225, 95, 190), (60, 200, 205)])
CEILING, FLOOR = np.array((158, 172, 196)), np.array((84, 76, 66))
HALF_FIELD = np.deg2rad(40.0)
"""Half the vertical angle of view; a wider picture shows more at its sides."""
HALF_WALL = 0.34
"""Half the height of a wall, in cells. As an agent keeps its distance, walls in front never fill the picture."""
PANELS = (1.0, 0.7)
"""Light of the first and second half of each face, so that moving along a wall of one colour is seen."""
SIDES = (1.0, 0.82)
"""Light of faces across x and across y."""
SUB = 2  # rays a column


def focal(height: int) -> float:
    """Distance of the picture plane in pixels, for pictures of this height."""
    return height / 2 / float(np.tan(HALF_FIELD))


def shade(depth: Any) -> Any:
    """Light that is left at a depth (in cells, along the line of sight)."""
    return np.maximum(1.0 / (1.0 + 0.12 * np.asarray(depth)), 0.45)


def backdrop(height: int) -> Array:
    """Ceiling above, floor below, without walls: float32 [H, 3] in grey levels."""
    away = np.abs(np.arange(height) - (height - 1) / 2)  # rows from the middle
    light = shade(HALF_WALL * focal(height) / np.maximum(away, 0.25))[:, None]
    upper = np.arange(height)[:, None] < height / 2
    return (np.where(upper, CEILING, FLOOR) * light).astype(np.float32)


def cast_rays(maze: Maze, x: Array, y: Array, dx: Array, dy: Array) -> tuple[Array, Array]:
    """First wall along rays from (x, y), N each, of direction (dx, dy): lengths in units of the direction, and which
    light and colour the wall has there, as `2 * PALETTE index + panel` + 16 for faces across y.

    The rays start outside walls; the rim of a maze is wall, so each of them ends.
    """
    count = len(x)
    column, row = x.astype(np.int32), y.astype(np.int32)
    with np.errstate(divide="ignore"):
        across_x, across_y = np.abs(1 / dx), np.abs(1 / dy)  # ray lengths between two crossings
    step_x, step_y = np.where(dx < 0, -1, 1).astype(np.int32), np.where(dy < 0, -1, 1).astype(np.int32)
    next_x = np.where(dx < 0, x - column, column + 1 - x) * np.minimum(across_x, 1e9)
    next_y = np.where(dy < 0, y - row, row + 1 - y) * np.minimum(across_y, 1e9)
    length, side = np.zeros(count), np.zeros(count, bool)
    alive = np.arange(count)
    state = [column, row, next_x, next_y, across_x, across_y, step_x, step_y]
    end_column, end_row = np.zeros(count, np.int32), np.zeros(count, np.int32)
    while len(alive):
        c, r, nx, ny, ax, ay, sx, sy = state
        along_y = ny < nx  # the next crossing is into another row
        here = np.where(along_y, ny, nx)
        c = np.where(along_y, c, c + sx)
        r = np.where(along_y, r + sy, r)
        nx, ny = np.where(along_y, nx, nx + ax), np.where(along_y, ny + ay, ny)
        hit = maze.walls[r, c]
        done = alive[hit]
        length[done], side[done] = here[hit], along_y[hit]
        end_column[done], end_row[done] = c[hit], r[hit]
        going = ~hit
        alive = alive[going]
        state = [v[going] for v in (c, r, nx, ny, ax, ay, sx, sy)]
    face = np.where(side, np.where(dy > 0, 2, 3), np.where(dx > 0, 0, 1))
    place = np.where(side, x + length * dx, y + length * dy) % 1.0
    panel = (place >= 0.5).astype(np.int32)
    return length, 2 * maze.faces[end_row, end_column, face].astype(np.int32) + panel + 16 * side


LIGHTS = np.zeros((32, 3), np.float32)
"""Colour of each kind of wall that `cast_rays` tells, near by, in grey levels."""
for _side, _panel in np.ndindex(2, 2):
    LIGHTS[16 * _side + _panel :: 2][: len(PALETTE)] = PALETTE * SIDES[_side] * PANELS[_panel]
KINDS = tuple(k for k in range(32) if k % 16 < 2 * len(PALETTE))
"""Those kinds."""


def render_views(maze: Maze, poses: Array, height: int, width: int) -> Array:
    """What is seen from `poses` [T, 3] (x, y, heading in radians): uint8 [T, H, W, 3]."""
    f = focal(height)
    across = ((np.arange(width * SUB) + 0.5) / SUB - width / 2) / f  # right of the line of sight, at depth 1
    x, y, heading = (poses[:, i, None] for i in range(3))
    cosine, sine = np.cos(heading), np.sin(heading)
    dx, dy = cosine - sine * across, sine + cosine * across  # [T, R]
    shape = dx.shape
    depth, kind = cast_rays(
        maze, np.broadcast_to(x, shape).ravel(), np.broadcast_to(y, shape).ravel(), dx.ravel(), dy.ravel()
    )
    depth = np.maximum(depth, 1e-3)  # directions have length 1 along the line of sight, so lengths are depths
    colour = (LIGHTS[kind] * shade(depth)[:, None].astype(np.float32)).reshape(*shape, 3)  # [T, R, 3]
    half = (HALF_WALL * f / depth).reshape(shape).astype(np.float32)  # rows from the middle to the wall's edge
    rows = (height + 1) // 2
    away = np.abs(np.arange(rows) - (height - 1) / 2).astype(np.float32)
    cover = np.empty((SUB, len(poses), rows, width), np.float32)  # the share of each pixel that is wall
    for sub in range(SUB):
        np.clip(half[:, None, sub::SUB] + 0.5 - away[None, :, None], 0, 1, out=cover[sub])
    cover /= SUB
    open_ = 1 - cover.sum(0)
    behind = backdrop(height)
    result = np.empty((len(poses), height, width, 3), np.uint8)
    for channel in range(3):  # one at a time: numpy is slow where the last axis is short
        lit = np.full(open_.shape, 0.5, np.float32)  # to round
        for sub in range(SUB):
            lit += cover[sub] * colour[:, None, sub::SUB, channel]
        result[:, :rows, :, channel] = lit + open_ * behind[:rows, channel, None]
        lower = lit + open_ * behind[height - rows :, channel, None][::-1]
        result[:, height - rows :, :, channel] = lower[:, ::-1]
    return result
