"""The shapes world: one moving shape on a steady background.

3,200 specs (5 shapes x 8 colours x 8 motions x 5 backgrounds x 2 sizes). Start position, speed and phase come from the
seed, within limits that keep the shape wholly inside the frame and every motion readable. All lengths are fractions
of the shorter side, so that any size shows the same picture; all speeds are fractions of the clip, so that any number
of frames shows the same motion.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass, fields
from functools import cache

import numpy as np

from kinetoscope.core.errors import InputError
from kinetoscope.worlds.base import SPLITS, Clip
from kinetoscope.worlds.drawing import BACKGROUNDS, COLOURS, EXTENT, SHAPES, SIZES, SUB, background_image, stamps
from kinetoscope.worlds.judge import judge_shapes

MOTIONS = (
    "moving left",
    "moving right",
    "moving up",
    "moving down",
    "circling clockwise",
    "circling counterclockwise",
    "bouncing up and down",
    "standing still",
)

_MOTION_WORDS: dict[str, tuple[str, ...]] = {
    "moving left": ("moving left", "moving to the left", "going left", "moves left"),
    "moving right": ("moving right", "moving to the right", "going right", "moves right"),
    "moving up": ("moving up", "moving upwards", "going up", "moves up"),
    "moving down": ("moving down", "moving downwards", "going down", "moves down"),
    "circling clockwise": ("circling clockwise", "going around clockwise", "circles clockwise"),
    "circling counterclockwise": (
        "circling counterclockwise",
        "going around counterclockwise",
        "circles counterclockwise",
    ),
    "bouncing up and down": ("bouncing up and down", "bouncing", "bounces up and down"),
    "standing still": ("standing still", "not moving", "stands still"),
}
_SIZE_WORDS: dict[str, tuple[str, ...]] = {"small": ("small", "little"), "large": ("large", "big")}
_MIN_SIDE = 16
_JITTER = 0.08  # of a path from the middle / shorter side


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


@dataclass(frozen=True)
class ShapeSpec:
    """One clip's attributes; see `ShapesWorld.attributes` for the values."""

    shape: str
    colour: str
    motion: str
    background: str
    size: str

    def attributes(self) -> dict[str, str]:
        """Attribute name to value, in the world's order."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def caption(self, rng: np.random.Generator | None = None) -> str:
        """The canonical sentence, e.g. "a small red circle moving left on a black background".

        With `rng`: a random wording, which leaves out the size and the background in some sentences (each in three of
        ten), so that "a red circle moving left" is as natural a prompt as the full one.
        """
        if rng is None:
            thing = _article(f"{self.size} {self.colour} {self.shape}")
            return f"{thing} {self.motion} on a {self.background} background"
        size = "" if rng.random() < 0.3 else self._pick(rng, _SIZE_WORDS[self.size]) + " "
        motion = self.motion if rng.random() < 0.5 else self._pick(rng, _MOTION_WORDS[self.motion])
        sentence = f"{_article(f'{size}{self.colour} {self.shape}')} {motion}"
        if rng.random() < 0.7:
            place = f"on a {self.background} background"
            sentence = f"{place}, {sentence}" if rng.random() < 0.15 else f"{sentence} {place}"
        if rng.random() < 0.15:
            sentence = sentence[0].upper() + sentence[1:]
        return sentence + "." if rng.random() < 0.15 else sentence

    @staticmethod
    def _pick(rng: np.random.Generator, words: tuple[str, ...]) -> str:
        return words[int(rng.integers(len(words)))]


def _is_heldout(spec: ShapeSpec) -> bool:
    return int.from_bytes(hashlib.sha256(spec.caption().encode()).digest()[:8], "big") % 10 == 0


@cache
def _split() -> dict[str, tuple[ShapeSpec, ...]]:
    combinations = itertools.product(SHAPES, COLOURS, MOTIONS, BACKGROUNDS, SIZES)
    specs = [ShapeSpec(*values) for values in combinations]
    heldout = tuple(s for s in specs if _is_heldout(s))
    return {"train": tuple(s for s in specs if not _is_heldout(s)), "heldout": heldout}


def _path(
    motion: str, rng: np.random.Generator, u: np.ndarray, reach_y: float, reach_x: float, jitter: float
) -> tuple[np.ndarray, np.ndarray]:
    """Offsets (y, x) of the shape from the middle of the frame at clip times `u`, within +-reach of each axis.

    Every motion passes near the middle and starts near the same place of its path: what the sentence leaves open is
    less than a shape's radius, so that a small model learns the motion rather than where to begin.
    """
    zero = np.zeros_like(u)
    away_y, away_x = rng.uniform(-1, 1, 2) * np.minimum(jitter, (reach_y, reach_x))
    if motion.startswith("circling"):
        radius = rng.uniform(0.75, 0.95) * min(reach_y, reach_x)
        sense = 1 if motion == "circling clockwise" else -1  # y points down, so growing angles turn clockwise
        start = -np.pi / 2 + rng.uniform(-0.5, 0.5)  # near the top
        angle = start + sense * 2 * np.pi * rng.uniform(0.95, 1.15) * u
        rest_y, rest_x = reach_y - radius, reach_x - radius
        y, x = np.clip(away_y, -rest_y, rest_y), np.clip(away_x, -rest_x, rest_x)
        return y + radius * np.sin(angle), x + radius * np.cos(angle)
    if motion == "standing still":
        return zero + away_y, zero + away_x
    if motion == "bouncing up and down":
        height = rng.uniform(0.75, 0.95) * 2 * reach_y
        ground = reach_y - rng.uniform(0, 1) * (2 * reach_y - height)
        phase = (rng.uniform(-0.08, 0.08) + rng.uniform(1.85, 2.15) * u) % 1.0
        return ground - height * 4 * phase * (1 - phase), zero + away_x
    along_x = motion in ("moving left", "moving right")
    reach, across = (reach_x, away_y) if along_x else (reach_y, away_x)
    distance = rng.uniform(0.75, 0.95) * 2 * reach
    sign = 1 if motion in ("moving right", "moving down") else -1
    along = rng.uniform(-1, 1) * (reach - distance / 2) + sign * distance * (u - 0.5)
    return (zero + across, along) if along_x else (along, zero + across)


class ShapesWorld:
    """One shape with a colour, a size and a motion, on a steady background."""

    name = "shapes"

    @property
    def attributes(self) -> dict[str, tuple[str, ...]]:
        """Attribute name to its possible values."""
        values = (SHAPES, tuple(COLOURS), MOTIONS, tuple(BACKGROUNDS), tuple(SIZES))
        return {f.name: v for f, v in zip(fields(ShapeSpec), values, strict=True)}

    def captions(self, split: str = "train") -> list[ShapeSpec]:
        """Every spec of "train" or "heldout" (a fixed tenth, chosen by a hash of the caption), in a fixed order."""
        if split not in SPLITS:
            raise InputError(f"unknown split {split!r}; use one of: {', '.join(SPLITS)}")
        return list(_split()[split])

    def render(
        self, spec: ShapeSpec, seed: int, *, height: int = 64, width: int = 64, num_frames: int = 33
    ) -> np.ndarray:
        """The clip as uint8 [T, H, W, 3]; start, speed and phase come from (spec, seed).

        Raises InputError for unknown attribute values, a negative seed, sides under 16 pixels or no frames.
        """
        self._check(spec, seed, height, width, num_frames)
        digest = hashlib.sha256(spec.caption().encode()).digest()
        rng = np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])
        short = min(height, width)
        radius = SIZES[spec.size] * short
        stamp = stamps(spec.shape, radius)
        side = stamp.shape[-1]
        extent = radius * EXTENT + 1
        u = np.arange(num_frames) / max(num_frames - 1, 1)
        y, x = _path(spec.motion, rng, u, height / 2 - extent, width / 2 - extent, _JITTER * short)
        # Positions in eighths of a pixel, of the corner of the stamp that puts its centre at (y, x).
        steps_y = np.floor((y + height / 2 - side // 2) * SUB).astype(int)
        steps_x = np.floor((x + width / 2 - side // 2) * SUB).astype(int)
        # The stamp is a little wider than the shape, so near an edge it hangs over: draw on a padded canvas.
        pad = 3
        background = background_image(spec.background, height, width)
        canvas = np.pad(background, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
        frames = np.empty((num_frames, *canvas.shape), np.uint8)
        frames[:] = np.round(canvas)
        colour = np.array(COLOURS[spec.colour], np.float32)
        for t in range(num_frames):
            top, left = steps_y[t] // SUB + pad, steps_x[t] // SUB + pad
            coverage = stamp[steps_y[t] % SUB, steps_x[t] % SUB][..., None]
            under = canvas[top : top + side, left : left + side]
            frames[t, top : top + side, left : left + side] = under + coverage * (colour - under) + 0.5
        return np.ascontiguousarray(frames[:, pad:-pad, pad:-pad])

    def sample(
        self, seed: int, split: str = "train", *, height: int = 64, width: int = 64, num_frames: int = 33
    ) -> Clip[ShapeSpec]:
        """A random clip of a split with a randomly worded caption, the same for the same seed."""
        if seed < 0:
            raise InputError(f"seed must not be negative, got {seed}")
        specs = _split()[split] if split in SPLITS else self.captions(split)
        rng = np.random.default_rng(seed)
        spec = specs[int(rng.integers(len(specs)))]
        caption = spec.caption(rng)
        frames = self.render(spec, seed, height=height, width=width, num_frames=num_frames)
        return Clip(frames, caption, spec)

    def _check(self, spec: ShapeSpec, seed: int, height: int, width: int, num_frames: int) -> None:
        for name, values in self.attributes.items():
            if getattr(spec, name) not in values:
                raise InputError(f"unknown {name} {getattr(spec, name)!r}; use one of: {', '.join(values)}")
        if seed < 0:
            raise InputError(f"seed must not be negative, got {seed}")
        if min(height, width) < _MIN_SIDE or num_frames < 1:
            raise InputError(
                f"cannot draw {num_frames} frames of {width}x{height}: use sides of at least {_MIN_SIDE} pixels "
                "and at least one frame"
            )

    def judge(self, frames: np.ndarray) -> dict[str, str | None]:
        """See `worlds.judge.judge_shapes`."""
        return judge_shapes(frames)
