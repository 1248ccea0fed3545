"""Pictures of two videos side by side: chosen frames, heat maps of their difference, a small animation."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, features

Array = np.ndarray[Any, Any]

COLUMNS = 6
LARGEST_SIDE = 256
"""Pixels of a picture's longer side; larger frames are scaled down."""
MOVING_FRAMES = 120
_GAP = 4
_DARKEST = 4.0
"""Grey levels at which a heat map is brightest at least, so that rounding does not glow."""
# Black over purple and orange to pale yellow: rising lightness, so that it also reads in grey.
_HEAT = np.array(
    [(8, 6, 18), (58, 14, 84), (120, 28, 109), (188, 55, 84), (237, 105, 37), (251, 180, 60), (252, 253, 191)], float
)


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Pictures of one pair.

    Attributes:
        frames: indices of the chosen frames: evenly spread, the worst of them all among them.
        a, b, heat: PNG bytes of each chosen frame, and of the difference of the two.
        brightest: grey levels of difference (mean over the channels) that the heat map's brightest colour stands for.
        moving: animated WebP of A, B and the difference; None where it cannot be made.
        size: (height, width) of one picture.
    """

    frames: tuple[int, ...]
    a: tuple[bytes, ...]
    b: tuple[bytes, ...]
    heat: tuple[bytes, ...]
    brightest: float
    moving: bytes | None
    size: tuple[int, int]


def side_by_side(a: Array, b: Array, per_frame: Sequence[float] | None = None, fps: float = 12.0) -> SideBySide:
    """Pictures of two videos uint8 [T, H, W, 3] of one size and length.

    Args:
        per_frame: similarity of each frame; the least similar one is shown. None: the one that differs most.
        fps: of the animation.
    """
    differences = [_difference(x, y) for x, y in zip(a, b, strict=True)]
    badness = [float(d.mean()) for d in differences] if per_frame is None else [-s for s in per_frame]
    brightest = max(_DARKEST, *(float(d.max()) for d in differences))
    chosen = _choose(len(a), int(np.argmax(badness)))
    small = [[_small(f) for f in frames] for frames in (a, b, (heat_map(d / brightest) for d in differences))]
    return SideBySide(
        frames=chosen,
        a=tuple(_png(small[0][t]) for t in chosen),
        b=tuple(_png(small[1][t]) for t in chosen),
        heat=tuple(_png(small[2][t]) for t in chosen),
        brightest=brightest,
        moving=_moving(small, fps),
        size=(small[0][0].height, small[0][0].width),
    )


def _difference(a: Array, b: Array) -> Array:
    """[H, W] mean absolute difference over the channels, in grey levels."""
    return np.abs(a.astype(np.float32) - b).mean(-1)


def heat_map(values: Array) -> Array:
    """Colours uint8 [..., 3] of values in [0, 1] (clipped): black is 0, pale yellow is 1."""
    position = np.clip(values, 0, 1) * (len(_HEAT) - 1)
    low = np.minimum(position.astype(int), len(_HEAT) - 2)
    share = (position - low)[..., None]
    return np.round(_HEAT[low] * (1 - share) + _HEAT[low + 1] * share).astype(np.uint8)


def heat_colours() -> list[str]:
    """The scale from 0 to 1 as CSS colours."""
    return [f"rgb({r:.0f},{g:.0f},{b:.0f})" for r, g, b in _HEAT]


def _choose(count: int, worst: int) -> tuple[int, ...]:
    picks = np.unique(np.linspace(0, count - 1, COLUMNS).round().astype(int))
    picks[np.abs(picks - worst).argmin()] = worst
    return tuple(int(p) for p in picks)


def _small(frame: Array) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(frame))
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.BOX)
    return image


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


def _moving(rows: Sequence[Sequence[Image.Image]], fps: float) -> bytes | None:
    """The videos of `rows` beside each other, as an animated WebP."""
    count = len(rows[0])
    if count < 2 or not features.check("webp"):
        return None
    step = -(-count // MOVING_FRAMES)
    height, width = rows[0][0].height, rows[0][0].width
    pictures: list[Image.Image] = []
    for t in range(0, count, step):
        sheet = Image.new("RGB", (len(rows) * (width + _GAP) - _GAP, height), "white")
        for column, row in enumerate(rows):
            sheet.paste(row[t], (column * (width + _GAP), 0))
        pictures.append(sheet)
    out = io.BytesIO()
    duration = max(1, round(1000 * step / max(fps, 0.1)))
    pictures[0].save(
        out, "WEBP", save_all=True, append_images=pictures[1:], duration=duration, loop=0, quality=85, method=4
    )
    return out.getvalue()
