"""Mazes: where the walls are, and what colour each of their faces has."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

ROOMS = 5
"""Rooms along each side of a maze."""
WIDTH = 2
"""Cells along each side of a room, so that there is space to step aside."""
PERIOD = WIDTH + 1
SIDE = PERIOD * ROOMS + 1
"""Cells along each side: rooms, with one cell of wall or passage between two of them."""
COLOURS = 6
_DOWN, _RIGHT = np.array(((0, 0, -1, 1), (-1, 1, 0, 0)))  # from a wall cell to where each of its faces looks
_LOOPS = 0.2  # of the walls between rooms that the search left are opened, so that there is more than one way


@dataclass(frozen=True, eq=False)
class Maze:
    """A maze of square cells of side 1; cell (i, j) covers y in [i, i + 1), x in [j, j + 1).

    Attributes:
        walls: bool [SIDE, SIDE]; the rim is all wall.
        faces: uint8 [SIDE, SIDE, 4], colour of each wall cell's faces toward (smaller x, larger x, smaller y,
            larger y); faces on one side of a room are of one colour.
    """

    walls: np.ndarray
    faces: np.ndarray

    @property
    def free(self) -> np.ndarray:
        """Cells without a wall, int [N, 2] (row, column)."""
        return np.argwhere(~self.walls)


@lru_cache(maxsize=256)
def build_maze(number: int) -> Maze:
    """The maze of this number: a depth-first search from room to room opens walls, then some more are opened."""
    rng = np.random.default_rng([number, 0x6D617A65])
    walls = np.ones((SIDE, SIDE), bool)
    seen = np.zeros((ROOMS, ROOMS), bool)

    def open_room(row: int, column: int) -> None:
        seen[row, column] = True
        top, left = PERIOD * row + 1, PERIOD * column + 1
        walls[top : top + WIDTH, left : left + WIDTH] = False

    def open_way(row: int, column: int, down: int, right: int) -> None:
        top, left = PERIOD * row + 1, PERIOD * column + 1
        rows = slice(top, top + WIDTH) if right else top + (WIDTH if down > 0 else -1)
        columns = slice(left, left + WIDTH) if down else left + (WIDTH if right > 0 else -1)
        walls[rows, columns] = False

    row, column = (int(v) for v in rng.integers(ROOMS, size=2))
    open_room(row, column)
    trail = [(row, column)]
    while trail:
        row, column = trail[-1]
        ways = [
            (a, b) for a, b in ((-1, 0), (1, 0), (0, -1), (0, 1))
            if 0 <= row + a < ROOMS and 0 <= column + b < ROOMS and not seen[row + a, column + b]
        ]  # fmt: skip
        if not ways:
            trail.pop()
            continue
        a, b = ways[int(rng.integers(len(ways)))]
        open_way(row, column, a, b)
        open_room(row + a, column + b)
        trail.append((row + a, column + b))
    for row, column in np.ndindex(ROOMS, ROOMS):
        for a, b in ((1, 0), (0, 1)):
            if row + a < ROOMS and column + b < ROOMS and rng.random() < _LOOPS:
                open_way(row, column, a, b)
    # A face has the colour of that side of the room it looks into. Faces of the rim that look out of the maze, to rooms
    # -1 and ROOMS, take the last two, which no room has.
    colours = rng.integers(COLOURS, size=(ROOMS + 2, ROOMS + 2, 4), dtype=np.uint8)
    row, column, side = np.ogrid[:SIDE, :SIDE, :4]
    faces = colours[(row + _DOWN[side]) // PERIOD, (column + _RIGHT[side]) // PERIOD, side]
    walls.setflags(write=False)
    faces.setflags(write=False)
    return Maze(walls, faces)
