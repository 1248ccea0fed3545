"""Structural similarity of two videos, frame by frame.

SSIM as in Wang, Bovik, Sheikh, Simoncelli 2004: an 11 x 11 Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03, range
255, averaged over the positions where the whole window lies inside the frame. It is taken on red, green and blue and
averaged, as pytorch-msssim and scikit-image do; the paper looks at luminance alone. Equal frames give exactly 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kinetoscope.core.errors import InputError

Array = np.ndarray[Any, Any]

WINDOW = 11
SIGMA = 1.5
C1 = (0.01 * 255) ** 2
C2 = (0.03 * 255) ** 2
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Of the five scales of MS-SSIM, finest first (Wang, Simoncelli, Bovik 2003)."""

_taps = np.exp(-((np.arange(WINDOW) - WINDOW // 2) ** 2) / (2 * SIGMA**2))
_TAPS = _taps / _taps.sum()


@dataclass(frozen=True, slots=True)
class Similarity:
    """How alike two videos are.

    Attributes:
        ssim: [T] SSIM of each frame; None for frames smaller than the window.
        ms_ssim: [T] multi-scale SSIM; None likewise.
        scales: scales of `ms_ssim`: the published five, or as many as a window fits in, their weights then scaled to
            sum 1.
    """

    ssim: Array | None
    ms_ssim: Array | None
    scales: int


def similarity(a: Array, b: Array) -> Similarity:
    """SSIM and MS-SSIM of two videos uint8 [T, H, W, 3].

    Raises:
        InputError: the arrays are no videos, or differ in frames or size.
    """
    check_alike(a, b)
    scales = scales_of(*a.shape[1:3])
    if scales == 0:
        return Similarity(None, None, 0)
    per_frame = [_frame(x, y, scales) for x, y in zip(a, b, strict=True)]
    return Similarity(np.array([s for s, _ in per_frame]), np.array([m for _, m in per_frame]), scales)


def scales_of(height: int, width: int) -> int:
    """Scales at which a window fits into a frame, at most five; 0 for frames smaller than the window."""
    return sum(min(height, width) >> level >= WINDOW for level in range(len(SCALE_WEIGHTS)))


def check_alike(a: Array, b: Array) -> None:
    """Refuse what cannot be compared frame by frame.

    Raises:
        InputError: the arrays are no videos, or differ in frames or size.
    """
    for video in (a, b):
        if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
            raise InputError(f"videos are compared as uint8 [T, H, W, 3], got {video.dtype} {list(video.shape)}")
    if a.shape[1:3] != b.shape[1:3]:
        raise InputError(f"sizes differ: {a.shape[1]}x{a.shape[2]} against {b.shape[1]}x{b.shape[2]}")
    if len(a) != len(b):
        raise InputError(f"lengths differ: {len(a)} frames against {len(b)}")


def _frame(a: Array, b: Array, scales: int) -> tuple[float, float]:
    """SSIM and MS-SSIM of two frames [H, W, 3]."""
    x, y = (np.moveaxis(f, -1, 0).astype(np.float64) for f in (a, b))  # [3, H, W]
    weights = np.array(SCALE_WEIGHTS[:scales])
    if scales < len(SCALE_WEIGHTS):
        weights = weights / weights.sum()  # the five are taken as published, though their sum is 1.0001
    product, first = np.ones(3), 0.0
    for level in range(scales):
        whole, contrast = _terms(x, y)
        if level == 0:
            first = float(whole.mean())
        last = level == scales - 1
        # a negative mean has no root; as others do, it counts as no similarity at all
        product = product * np.maximum(whole if last else contrast, 0) ** weights[level]
        if not last:
            x, y = _halve(x), _halve(y)
    return first, float(product.mean())


def _terms(x: Array, y: Array) -> tuple[Array, Array]:
    """Mean SSIM and mean contrast-structure term of each channel, from [3, H, W]."""
    mx, my = _blur(x), _blur(y)
    xx, yy, xy = _blur(x * x) - mx * mx, _blur(y * y) - my * my, _blur(x * y) - mx * my
    contrast = (2 * xy + C2) / (xx + yy + C2)
    luminance = (2 * (mx * my) + C1) / (mx * mx + my * my + C1)
    return (luminance * contrast).mean((1, 2)), contrast.mean((1, 2))


def _blur(x: Array) -> Array:
    """[..., H, W] -> [..., H - 10, W - 10]: the window's mean wherever it lies wholly inside."""
    for axis in (-2, -1):
        count, half = x.shape[axis] - WINDOW + 1, WINDOW // 2
        x = np.swapaxes(x, axis, -1)
        parts = [x[..., k : k + count] for k in range(WINDOW)]
        total = parts[half] * _TAPS[half]
        for k in range(half):  # the window is symmetric
            total = total + (parts[k] + parts[-1 - k]) * _TAPS[k]
        x = np.swapaxes(total, axis, -1)
    return x


def _halve(x: Array) -> Array:
    """Means of 2 x 2 pixels; an odd last row or column is left out."""
    x = x[..., : x.shape[-2] // 2 * 2, : x.shape[-1] // 2 * 2]
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
