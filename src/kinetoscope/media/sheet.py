"""Contact sheets: many videos on one picture, time running to the right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from kinetoscope.core.errors import InputError
from kinetoscope.core.files import replacing

MARGIN, LINE = 4, 14


def contact_sheet(
    videos: Sequence[np.ndarray[Any, Any]],
    path: str | Path,
    *,
    labels: Sequence[str] = (),
    columns: int = 8,
    scale: int = 1,
) -> Path:
    """Write one row a video: `columns` frames spread over its length, under its label.

    Args:
        videos: uint8 [T, H, W, 3] each, of one size.
        path: a .png file, written through a temporary name.
        labels: one for each video, or none.
        scale: whole-number enlargement.

    Raises:
        InputError: no videos, different sizes, or another number of labels.
        OutputError: the file cannot be written.
    """
    sizes = {v.shape[1:3] for v in videos}
    if len(sizes) != 1 or (labels and len(labels) != len(videos)):
        raise InputError(
            f"a contact sheet needs videos of one size and a label each; got {len(videos)} of sizes {sizes}"
        )
    height, width = (n * scale for n in sizes.pop())
    top = LINE if labels else 0
    sheet = Image.new(
        "RGB", (columns * (width + MARGIN) + MARGIN, len(videos) * (height + top + MARGIN) + MARGIN), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for row, video in enumerate(videos):
        y = MARGIN + row * (height + top + MARGIN)
        if labels:
            draw.text((MARGIN, y), labels[row], fill="black")
        picks = np.linspace(0, len(video) - 1, columns).round().astype(int)
        for column, index in enumerate(picks):
            tile = Image.fromarray(video[index]).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(tile, (MARGIN + column * (width + MARGIN), y + top))
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")
    return Path(path)
