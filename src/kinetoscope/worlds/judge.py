"""Reads the attributes of a moving-shapes clip back from its pixels.

No learning: the background is the known one that fits most pixels, the shape is what differs from it, and its colour,
outline, size and path are compared with what the renderer draws.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from kinetoscope.core.errors import InputError
from kinetoscope.worlds.drawing import BACKGROUNDS, COLOURS, SHAPES, SIZES, background_image, stamps

Array = np.ndarray[Any, Any]

_BACKGROUND_SHARE = 0.6  # the shape covers at most a fifth of a frame, so this share of pixels is surely background
_FOREGROUND = 45.0  # Euclidean RGB distance; object colours are at least 80 from every background
_SMALLEST = 0.004  # of a frame; the smallest shape covers 0.015
_STILL = 0.08  # of the shorter side; the shortest motion covers 0.25
_ROUND = 0.4  # shorter / longer range of a path above which it is a circle
_RETURNS = 1.8  # way travelled / range of a path above which it goes back and forth
_FITTED_FRAMES = 9


def judge_shapes(frames: Array) -> dict[str, str | None]:
    """Attribute -> value read from uint8 [T, H, W, 3] frames; None where there is nothing to read.

    Raises InputError for an array of another kind or shape.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise InputError(f"the judge reads uint8 frames [T, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    video = frames.astype(np.float32)
    background, backdrop = _read_background(video)
    result: dict[str, str | None] = {
        "shape": None, "colour": None, "motion": None, "background": background, "size": None,
    }  # fmt: skip
    difference = video - backdrop  # [T, H, W, 3]
    distance = np.sqrt(np.square(difference).sum(-1))
    colour = _read_colour(video, distance)
    if colour is None:
        return result
    result["colour"] = colour
    toward = np.array(COLOURS[colour], np.float32) - backdrop  # [H, W, 3]
    cover = np.clip((difference * toward).sum(-1) / np.square(toward).sum(-1), 0, 1)  # [T, H, W]
    cover[cover < 0.25] = 0
    area = cover.sum((1, 2))
    seen = area > _SMALLEST * cover.shape[1] * cover.shape[2]
    if not seen.any():
        return result
    rows, columns = np.arange(cover.shape[1]), np.arange(cover.shape[2])
    weight = np.maximum(area, 1e-6)
    y = (cover.sum(2) * rows).sum(1) / weight
    x = (cover.sum(1) * columns).sum(1) / weight
    result["shape"], result["size"] = _read_outline(cover[seen], y[seen], x[seen])
    result["motion"] = _read_motion(y[seen], x[seen], min(cover.shape[1:]))
    return result


def _read_background(video: Array) -> tuple[str, Array]:
    """The known background that is nearest on the pixels it fits best."""
    errors: dict[str, float] = {}
    for name in BACKGROUNDS:
        error = np.abs(video - background_image(name, *video.shape[1:3])).sum(-1).ravel()
        kept = int(_BACKGROUND_SHARE * error.size)
        errors[name] = float(np.partition(error, kept)[:kept].mean())
    name = min(errors, key=lambda n: errors[n])
    return name, background_image(name, *video.shape[1:3])


def _read_colour(video: Array, distance: Array) -> str | None:
    """The palette colour nearest to the typical pixel of the shape's inside."""
    inside = distance > _FOREGROUND
    if inside.mean() < _SMALLEST:
        return None
    core = inside & (distance > 0.8 * np.quantile(distance[inside], 0.9))
    typical = np.median(video[core], axis=0)
    return min(COLOURS, key=lambda c: float(np.square(typical - np.array(COLOURS[c])).sum()))


@cache
def _template(shape: str, radius: float, sub_y: int, sub_x: int) -> tuple[Array, float, float]:
    """A stamp with its centroid, in pixels from its corner."""
    stamp = stamps(shape, radius)[sub_y, sub_x]
    axis = np.arange(stamp.shape[0])
    return stamp, float((stamp.sum(1) * axis).sum() / stamp.sum()), float((stamp.sum(0) * axis).sum() / stamp.sum())


def _read_outline(cover: Array, y: Array, x: Array) -> tuple[str, str]:
    """The shape and size whose stamps, laid on the centroids, differ least from the coverage."""
    picks = np.unique(np.linspace(0, len(cover) - 1, _FITTED_FRAMES).round().astype(int))
    short = min(cover.shape[1:])
    errors: dict[tuple[str, str], float] = {}
    for shape in SHAPES:
        for size, fraction in SIZES.items():
            errors[shape, size] = sum(_misfit(cover[t], y[t], x[t], shape, fraction * short) for t in picks)
    return min(errors, key=lambda k: errors[k])


def _misfit(cover: Array, y: Any, x: Any, shape: str, radius: float) -> float:
    """Squared difference between a frame's coverage and a stamp on the same centroid."""
    _, mid_y, mid_x = _template(shape, radius, 0, 0)
    top, left = y - mid_y, x - mid_x
    sub_y, sub_x = int(top % 1 * 8), int(left % 1 * 8)
    stamp, _, _ = _template(shape, radius, sub_y, sub_x)
    drawn = np.zeros_like(cover)
    a, b = int(np.floor(top)), int(np.floor(left))
    rows = slice(max(a, 0), min(a + stamp.shape[0], cover.shape[0]))
    columns = slice(max(b, 0), min(b + stamp.shape[1], cover.shape[1]))
    if rows.start < rows.stop and columns.start < columns.stop:
        drawn[rows, columns] = stamp[rows.start - a : rows.stop - a, columns.start - b : columns.stop - b]
    return float(np.square(cover - drawn).sum())


def _read_motion(y: Array, x: Array, short: int) -> str:
    """The motion that a path of centroids shows."""
    y, x = _smooth(y), _smooth(x)
    range_y, range_x = float(np.ptp(y)), float(np.ptp(x))
    longer, shorter = max(range_y, range_x), min(range_y, range_x)
    if longer < _STILL * short:
        return "standing still"
    if shorter > _ROUND * longer:
        turn = float(np.sum((x[:-1] - x.mean()) * np.diff(y) - (y[:-1] - y.mean()) * np.diff(x)))
        return "circling clockwise" if turn > 0 else "circling counterclockwise"  # y points down
    if range_x > range_y:
        return "moving right" if x[-1] > x[0] else "moving left"
    if np.abs(np.diff(y)).sum() > _RETURNS * range_y:
        return "bouncing up and down"
    return "moving down" if y[-1] > y[0] else "moving up"


def _smooth(path: Array) -> Array:
    """Median of three, so that one bad frame does not make a path longer."""
    if len(path) < 3:
        return path
    padded = np.pad(path, 1, mode="edge")
    return np.median(np.stack([padded[:-2], padded[1:-1], padded[2:]]), axis=0)
