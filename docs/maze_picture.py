"""Draws docs/images/maze.png: python docs/maze_picture.py"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from kinetoscope.worlds import get_world

WALKS = (1, 2, 3, 5)


def main() -> None:
    """One row a walk, every sixth frame."""
    world = get_world("maze")
    rows = [np.concatenate(list(world.sample(seed, num_frames=61).frames[::6]), 1) for seed in WALKS]
    sheet = Image.fromarray(np.concatenate(rows))
    sheet.resize((sheet.width * 3 // 2, sheet.height * 3 // 2), Image.Resampling.LANCZOS).save(
        Path(__file__).parent / "images" / "maze.png", optimize=True
    )


if __name__ == "__main__":
    main()
