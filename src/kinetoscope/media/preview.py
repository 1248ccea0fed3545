"""Files of previews: the small frames of a run's steps, enlarged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kinetoscope.core.errors import OutputError
from kinetoscope.core.files import replacing

Array = np.ndarray[Any, Any]

SUFFIXES = (".png", ".gif")
_TILES = 8
_SHORT_SIDE = 96
_GAP = 2
_STEP_MS, _LAST_MS = 150, 1500


def strip(frames: Array) -> Image.Image:
    """Frames uint8 [t, h, w, 3] beside each other, at most eight of them, smoothly enlarged to 96 pixels or more."""
    picks = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), _TILES)).round().astype(int))
    scale = max(1, -(-_SHORT_SIDE // min(frames.shape[1:3])))
    height, width = (n * scale for n in frames.shape[1:3])
    sheet = Image.new("RGB", (len(picks) * (width + _GAP) - _GAP, height), "white")
    for column, index in enumerate(picks):
        tile = Image.fromarray(np.ascontiguousarray(frames[index])).resize((width, height), Image.Resampling.BICUBIC)
        sheet.paste(tile, (column * (width + _GAP), 0))
    return sheet


class PreviewFile:
    """The steps of one video as a file: a .png has the latest and is written at every step; a .gif has them all and is
    written by `finish`.

    Args:
        path: the file; it is written through a temporary name.

    Raises:
        OutputError: another suffix.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix.lower() not in SUFFIXES:
            raise OutputError(f"preview {path}: use {' or '.join(SUFFIXES)}")
        self.path = path
        self._strips: list[Image.Image] = []

    def add(self, frames: Array) -> None:
        """One step, uint8 [t, h, w, 3].

        Raises:
            OutputError: the file cannot be written.
        """
        latest = strip(frames)
        if self.path.suffix.lower() == ".png":
            self._write(latest, format="PNG")
        else:
            self._strips.append(latest)

    def finish(self) -> None:
        """Write what is not written yet.

        Raises:
            OutputError: the file cannot be written.
        """
        if not self._strips:
            return
        size = max(s.width for s in self._strips), max(s.height for s in self._strips)  # blocks may differ in frames
        pages = [Image.new("RGB", size, "white") for _ in self._strips]
        for page, one in zip(pages, self._strips, strict=True):
            page.paste(one)
        duration = [_STEP_MS] * (len(pages) - 1) + [_LAST_MS]
        self._write(pages[0], format="GIF", save_all=True, append_images=pages[1:], duration=duration, loop=0)
        self._strips = []

    def _write(self, image: Image.Image, **how: Any) -> None:
        with replacing(self.path, sync=False) as temporary:  # written at every step, and no loss
            image.save(temporary, **how)
