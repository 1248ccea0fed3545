"""Mazes: where the walls are, and what colour each of their faces has."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

ROOMS = 7
"""Rooms along each side of a maze."""
SIDE = 2 * ROOMS + 1
"""Cells along each side: rooms are cells of odd row and column, with a wall or a passage between them."""
COLOURS = 6
_LOOPS = 0.15  # of the inner walls that the search left are opened, so that there is more than one way
_HALLS = 1  # places of 3 x 3 cells without walls


@dataclass(frozen=True, eq=False)
class Maze:
    """A maze of square cells of side 1; cell (i, j) covers y in [i, i + 1), x in [j, j + 1).

    Attributes:
        walls: bool [SIDE, SIDE]; the rim is all wall.
        faces: uint8 [SIDE, SIDE, 4], colour of each wall cell's faces toward (smaller x, larger x, smaller y,
            larger y).
    """

    walls: np.ndarray
    faces: np.ndarray

    @property
    def free(self) -> np.ndarray:
        """Cells without a wall, int [N, 2] (row, column)."""
        return np.argwhere(~self.walls)


@lru_cache(maxsize=256)
def build_maze(number: int) -> Maze:
    """The maze of this number: a recursive backtracker, then some loops and halls."""
    rng = np.random.default_rng([number, 0x6D617A65])
    walls = np.ones((SIDE, SIDE), bool)
    walls[1::2, 1::2] = False
    seen = np.zeros((ROOMS, ROOMS), bool)
    row, column = (int(v) for v in rng.integers(ROOMS, size=2))
    seen[row, column] = True
    trail = [(row, column)]
    while trail:
        row, column = trail[-1]
        steps = [(-1, 0), (1, 0), (0, -1), (0, 1)]
        steps = [
            (a, b) for a, b in steps
            if 0 <= row + a < ROOMS and 0 <= column + b < ROOMS and not seen[row + a, column + b]
        ]  # fmt: skip
        if not steps:
            trail.pop()
            continue
        a, b = steps[int(rng.integers(len(steps)))]
        walls[2 * row + 1 + a, 2 * column + 1 + b] = False
        seen[row + a, column + b] = True
        trail.append((row + a, column + b))
    inner = np.argwhere(walls[1:-1, 1:-1]) + 1
    between = inner[inner.sum(1) % 2 == 1]  # walls between two rooms; the others are posts
    opened = between[rng.random(len(between)) < _LOOPS]
    walls[opened[:, 0], opened[:, 1]] = False
    for i, j in rng.integers(1, SIDE - 3, size=(_HALLS, 2)):
        walls[i : i + 3, j : j + 3] = False
    faces = rng.integers(COLOURS, size=(SIDE, SIDE, 4), dtype=np.uint8)
    walls.setflags(write=False)
    faces.setflags(write=False)
    return Maze(walls, faces)
