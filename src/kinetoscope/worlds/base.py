"""What every world offers: specs with captions, a renderer, and a judge.

A world is a procedural source of captioned clips. Because the clips are drawn by a program, a program can also read
them back, so that prompt following is measured without a learned judge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

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
