"""What the shapes world is drawn with: palette, outlines, backgrounds. The judge compares with the same."""

from __future__ import annotations

import itertools
from functools import lru_cache

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 38, 38),
    "orange": (248, 140, 20),
    "yellow": (246, 224, 48),
    "green": (34, 160, 60),
    "cyan": (40, 205, 222),
    "blue": (48, 92, 236),
    "purple": (148, 52, 188),
    "pink": (255, 140, 196),
}
# Two greys of a pattern are steady and colourless, so that no object colour is near any background.
BACKGROUNDS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "black": ((10, 10, 10), (10, 10, 10)),
    "white": ((242, 242, 242), (242, 242, 242)),
    "navy": ((18, 26, 78), (18, 26, 78)),
    "striped": ((64, 64, 64), (112, 112, 112)),
    "checkered": ((156, 156, 156), (204, 204, 204)),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES: dict[str, float] = {"small": 0.17, "large": 0.26}  # radius / shorter side

EXTENT = 1.12  # the farthest point of any outline from its centre, in radii
_CELL = 0.125  # width of a stripe or check / shorter side
SUB = 8  # supersampling per axis; also the steps of sub-pixel position


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points (in radii, y down) lie inside the outline of a shape centred on the origin."""
    if shape == "circle":
        return x * x + y * y <= 1
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 0.88
    if shape == "cross":
        return (np.maximum(abs(x), abs(y)) <= 1.05) & (np.minimum(abs(x), abs(y)) <= 0.34)
    if shape == "triangle":
        corners = [(0.0, -1.08), (1.08, 0.88), (-1.08, 0.88)]
    else:
        radii = [EXTENT, 0.46] * 5
        angles = np.arange(10) * np.pi / 5 - np.pi / 2
        corners = [(r * np.cos(a), r * np.sin(a)) for r, a in zip(radii, angles, strict=True)]
    crossings = np.zeros(x.shape, int)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        if ay != by:
            crossings += ((ay > y) != (by > y)) & (x < (bx - ax) * (y - ay) / (by - ay) + ax)
    return crossings % 2 == 1


@lru_cache(maxsize=64)
def stamps(shape: str, radius: float) -> np.ndarray:
    """Coverage of a shape at every sub-pixel position: float32 [8, 8, P, P] in [0, 1].

    `stamps(...)[j, i]` is the shape centred at pixel coordinate (P // 2 + j / 8, P // 2 + i / 8) (y, x), each pixel
    the exact mean of 8 x 8 samples. `radius` is in pixels.
    """
    half = int(np.ceil(radius * EXTENT)) + 1
    side = 2 * half + 1
    axis = (np.arange((side + 1) * SUB) + 0.5) / SUB - half - 1  # one pixel of slack for the shifts below
    y, x = np.meshgrid(axis / radius, axis / radius, indexing="ij")
    inside = _inside(shape, x, y)
    result = np.empty((SUB, SUB, side, side), np.float32)
    for j, i in itertools.product(range(SUB), repeat=2):
        window = inside[SUB - j :, SUB - i :][: side * SUB, : side * SUB]
        result[j, i] = window.reshape(side, SUB, side, SUB).mean((1, 3))
    result.setflags(write=False)
    return result


@lru_cache(maxsize=32)
def background_image(background: str, height: int, width: int) -> np.ndarray:
    """The steady background as float32 [H, W, 3] in grey levels."""
    cell = max(1, round(_CELL * min(height, width)))
    rows, columns = np.arange(height)[:, None] // cell, np.arange(width)[None] // cell
    odd = (columns + (rows if background == "checkered" else 0 * rows)) % 2 == 1
    first, second = (np.array(c, np.float32) for c in BACKGROUNDS[background])
    image = np.where(odd[..., None], second, first)
    image.setflags(write=False)
    return image
