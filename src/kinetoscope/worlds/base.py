"""What every world offers: specs with captions, a renderer, and a judge.

A world is a procedural source of captioned clips. Because the clips are drawn by a program, a program can also read
them back, so that prompt following is measured without a learned judge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

SPLITS = ("train", "heldout")


class Spec(Protocol):
    """One choice of a value for every attribute of a world; hashable, with one attribute field per attribute name."""

    def caption(self, rng: np.random.Generator | None = None) -> str:
        """The canonical sentence of this spec, or a randomly worded and possibly shortened one when given `rng`."""
        ...

    def attributes(self) -> dict[str, str]:
        """Attribute name to value, in the world's order."""
        ...


SpecT = TypeVar("SpecT", bound=Spec)


@dataclass(frozen=True, eq=False)
class Actions:
    """What is done in each pixel frame of a clip, as in the layout "universal" of `media.actions`. It is seen in the
    next frame.

    Attributes:
        keyboard: float32 [T, 4] in [0, 1], whether forward, back, left and right are pressed.
        mouse: float32 [T, 2] in [-1, 1], turns (up, right).
    """

    keyboard: np.ndarray
    mouse: np.ndarray


@dataclass(frozen=True)
class Clip(Generic[SpecT]):
    """A rendered clip: `frames` uint8 [T, H, W, 3] (RGB), the sentence that describes it, its spec, and, in worlds
    where somebody acts, what was done in each frame."""

    frames: np.ndarray
    caption: str
    spec: SpecT
    actions: Actions | None = None


class World(Protocol[SpecT]):
    """Captioned clips drawn by a program, and the judge that reads them back."""

    @property
    def name(self) -> str: ...

    @property
    def attributes(self) -> dict[str, tuple[str, ...]]:
        """Attribute name to its possible values."""
        ...

    def captions(self, split: str = "train") -> list[SpecT]:
        """Every spec of a split ("train" or "heldout") in a fixed order; the two splits are disjoint."""
        ...

    def render(self, spec: SpecT, seed: int, *, height: int = 64, width: int = 64, num_frames: int = 33) -> np.ndarray:
        """The clip of `spec` as uint8 [T, H, W, 3], the same for the same (spec, seed, size)."""
        ...

    def sample(
        self, seed: int, split: str = "train", *, height: int = 64, width: int = 64, num_frames: int = 33
    ) -> Clip[SpecT]:
        """A random clip of a split with a randomly worded caption, the same for the same seed."""
        ...

    def judge(self, frames: np.ndarray) -> dict[str, str | None]:
        """The attributes read from the pixels of uint8 [T, H, W, 3] frames; None where nothing can be read."""
        ...


class Game(Protocol):
    """A true game of a world, a frame at a time; see `worlds.maze.MazeGame`."""

    def reset(self, seed: int) -> np.ndarray:
        """The first view, uint8 [H, W, 3], in a place never trained on; the same for the same seed."""
        ...

    def step(self, keyboard: np.ndarray, mouse: np.ndarray) -> np.ndarray:
        """Do something, and see the next view."""
        ...


class Player(Protocol):
    """Who plays a game that anybody may draw."""

    def act(self, view: np.ndarray, frames: int) -> tuple[np.ndarray, np.ndarray]:
        """Keyboard [K] and mouse [2] that are held for the next `frames` frames, having seen `view` [H, W, 3]."""
        ...


class PlayedWorld(Protocol):
    """A world that is played, and judged by what its views show whoever draws them (`evaluation.playing`)."""

    @property
    def name(self) -> str: ...

    @property
    def gap(self) -> int:
        """Frames of a motion."""
        ...

    def game(self, height: int, width: int) -> Game:
        """True games, with views of a size."""
        ...

    def player(self, seed: int) -> Player:
        """Who does random things."""
        ...

    def is_view(self, frames: np.ndarray) -> np.ndarray:
        """Whether each of uint8 frames [T, H, W, 3] is a view of the world, bool [T]."""
        ...

    def read_motions(self, frames: np.ndarray) -> Any:
        """What N successive parts of `gap` frames show of how the eye moved."""
        ...

    def told_motions(self, keyboard: np.ndarray, mouse: np.ndarray) -> np.ndarray:
        """The motions [N, ...] that the keyboard [T, K] and the mouse [T, 2] of the frames tell."""
        ...

    def followed(self, seen: Any, told: np.ndarray) -> dict[str, np.ndarray]:
        """For each way in which a motion may be right, whether each of the N is, bool [N]."""
        ...
