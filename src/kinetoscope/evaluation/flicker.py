"""Is a video steady?"""

from __future__ import annotations

from typing import Any

import numpy as np

from kinetoscope.core.errors import InputError


def flicker(frames: np.ndarray[Any, Any]) -> float:
    """Median over pixels of the mean absolute second difference in time, in grey levels; 0 is steady.

    The second difference of a pixel is |x[t+1] - 2 x[t] + x[t-1]|: smooth change does not count. The median looks past
    the pixels that something moves over.

    Args:
        frames: uint8 [T, H, W, 3] with at least three frames.

    Raises:
        InputError: fewer frames.
    """
    if len(frames) < 3:
        raise InputError(f"flicker needs at least 3 frames, got {len(frames)}")
    second = np.abs(np.diff(frames.astype(np.float32), n=2, axis=0))
    return float(np.median(second.mean((0, 3))))
