"""The maze world: walks through seeded mazes, seen by who walks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kinetoscope.core.errors import InputError
from kinetoscope.worlds.base import SPLITS, Actions, Clip
from kinetoscope.worlds.maze.judge import is_maze
from kinetoscope.worlds.maze.layout import Maze, build_maze
from kinetoscope.worlds.maze.play import PlayedMaze
from kinetoscope.worlds.maze.render import render_views
from kinetoscope.worlds.maze.walk import restless, start, step, walk

MAZES = {"train": range(4096), "heldout": range(1_000_000, 1_000_512)}
"""Numbers of the mazes of each split."""
PLACE = "maze"
_WORDS = ("a walk through a maze", "walking in a maze", "inside a maze", "a maze of coloured walls")
_MIN_SIDE = 32
_BEHIND_VIEW = 0x77616C6B  # apart from the generator that words captions


@dataclass(frozen=True)
class MazeSpec:
    """One maze by its number. All of them read the same in words: what a clip shows is up to its actions."""

    number: int

    def caption(self, rng: np.random.Generator | None = None) -> str:
        """The canonical sentence, or with `rng` one of several wordings."""
        return _WORDS[0 if rng is None else int(rng.integers(len(_WORDS)))]

    def attributes(self) -> dict[str, str]:
        """The place, always a maze."""
        return {"place": PLACE}


class MazeWorld(PlayedMaze):
    """First-person walks in mazes."""

    name = "maze"

    @property
    def attributes(self) -> dict[str, tuple[str, ...]]:
        """Attribute name to its possible values."""
        return {"place": (PLACE,)}

    def captions(self, split: str = "train") -> list[MazeSpec]:
        """A spec for each maze of "train" or "heldout", in a fixed order."""
        if split not in SPLITS:
            raise InputError(f"unknown split {split!r}; use one of: {', '.join(SPLITS)}")
        return [MazeSpec(n) for n in MAZES[split]]

    def render(
        self, spec: MazeSpec, seed: int, *, height: int = 64, width: int = 64, num_frames: int = 33
    ) -> np.ndarray:
        """The walk of (spec, seed) as uint8 [T, H, W, 3].

        Raises InputError for a negative number or seed, sides under 32 pixels or no frames.
        """
        return self._clip(spec, seed, height, width, num_frames)[0]

    def sample(
        self, seed: int, split: str = "train", *, height: int = 64, width: int = 64, num_frames: int = 33
    ) -> Clip[MazeSpec]:
        """A random walk in a maze of a split, with what was done in each frame, the same for the same seed."""
        specs = self.captions(split)
        if seed < 0:
            raise InputError(f"seed must not be negative, got {seed}")
        rng = np.random.default_rng(seed)
        spec = specs[int(rng.integers(len(specs)))]
        frames, actions = self._clip(spec, seed, height, width, num_frames)
        return Clip(frames, spec.caption(rng), spec, actions)

    def _clip(self, spec: MazeSpec, seed: int, height: int, width: int, num_frames: int) -> tuple[np.ndarray, Actions]:
        _check(spec.number, seed, height, width)
        if num_frames < 1:
            raise InputError(f"cannot draw {num_frames} frames: at least one is needed")
        maze, pose, rng = _begin(spec.number, seed)
        actions = restless(maze, pose, num_frames, rng)
        return render_views(maze, walk(maze, pose, actions), height, width), actions

    def game(self, height: int, width: int) -> MazeGame:
        """A maze to walk in a frame at a time."""
        return MazeGame(height, width)

    def judge(self, frames: np.ndarray) -> dict[str, str | None]:
        """Whether most of the views of uint8 [T, H, W, 3] frames are of a maze (`worlds.maze.judge.is_maze`)."""
        return {"place": PLACE if is_maze(frames).mean() > 0.5 else None}


class MazeGame:
    """A maze that is walked a frame at a time, as a person would play it.

    Args:
        height, width: of the views, in pixels; at least 32.

    Raises:
        InputError: smaller views.
    """

    def __init__(self, height: int = 64, width: int = 64) -> None:
        _check(0, 0, height, width)
        self.height, self.width = height, width
        self.reset(0)

    def reset(self, seed: int, *, split: str = "heldout") -> np.ndarray:
        """The first view, uint8 [H, W, 3], in a maze of the split; the same for the same seed.

        Raises InputError for a negative seed or an unknown split.
        """
        if split not in SPLITS or seed < 0:
            raise InputError(f"seed={seed} must not be negative, and split={split!r} one of: {', '.join(SPLITS)}")
        mazes = MAZES[split]
        self.maze, self.pose, _ = _begin(mazes[seed % len(mazes)], seed)
        return self.view()

    def step(self, keyboard: Sequence[float] | np.ndarray, mouse: Sequence[float] | np.ndarray = (0, 0)) -> np.ndarray:
        """Do something, and see the next view, uint8 [H, W, 3].

        Args:
            keyboard: forward, back, left, right, in [0, 1].
            mouse: turns (up, right), in [-1, 1]; nobody looks up or down in a maze.

        Raises:
            InputError: other shapes, or numbers out of range.
        """
        keys, turn = np.asarray(keyboard, np.float32), np.asarray(mouse, np.float32)
        if keys.shape != (4,) or not ((keys >= 0) & (keys <= 1)).all():
            raise InputError(f"keyboard={keyboard!r} should be four numbers in [0, 1]: forward, back, left, right")
        if turn.shape != (2,) or not ((turn >= -1) & (turn <= 1)).all():
            raise InputError(f"mouse={mouse!r} should be two numbers in [-1, 1]: up, right")
        self.pose = step(self.maze, self.pose, keys, turn)
        return self.view()

    def view(self) -> np.ndarray:
        """What is seen now."""
        return render_views(self.maze, np.array([self.pose]), self.height, self.width)[0]


def _begin(number: int, seed: int) -> tuple[Maze, tuple[float, float, float], Any]:
    """A maze, a place in it, and the generator of what comes next."""
    rng = np.random.default_rng([seed, number, _BEHIND_VIEW])
    maze = build_maze(number)
    return maze, start(maze, rng), rng


def _check(number: int, seed: int, height: int, width: int) -> None:
    if number < 0 or seed < 0:
        raise InputError(f"the number of a maze and a seed must not be negative, got {number} and {seed}")
    if min(height, width) < _MIN_SIDE:
        raise InputError(f"cannot draw views of {width}x{height}: use sides of at least {_MIN_SIDE} pixels")
