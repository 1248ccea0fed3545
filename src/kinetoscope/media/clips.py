"""Videos given by the user, as frames of the size and rate that a request needs."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kinetoscope.core.errors import InputError
from kinetoscope.media.decoding import Array, open_video, resample
from kinetoscope.media.pictures import fit_picture, load_picture

Clip = str | Path | Array | Sequence[Any]

MAX_BYTES = 2**30
"""Pixels of a clip that are held at once where the caller does not say how many frames it needs."""

SAME_RATE = 0.005
"""Rates that differ by less are one: 23.976 and 24."""

logger = logging.getLogger(__name__)


def load_clip(source: Clip, limit: int | None = None, *, fps: float | None = None) -> list[Image.Image]:
    """Return the frames of a video at its own size, at most `limit` of them.

    Args:
        source: a file, an array [T, H, W, 3] (uint8, or floats in [0, 1]), or a list of pictures.
        limit: frames from the beginning; None: all, within `MAX_BYTES`.
        fps: frames a second to bring a file to, by taking the frame nearest to each time; None: its frames by number.
            Arrays and lists have no rate of their own and are taken frame by frame.

    Raises:
        InputError: the source cannot be read, holds no frame, or is too large.
    """
    with _named(source):
        return list(bounded(_frames(source, fps), limit))


def load_frames(
    source: Clip,
    height: int,
    width: int,
    *,
    fps: float | None = None,
    limit: int | None = None,
    last: int | None = None,
) -> list[Array]:
    """Return frames uint8 [height, width, 3], each fitted as soon as it is decoded (`fit_picture`).

    Args:
        source: see `load_clip`.
        height, width: pixels of the frames.
        fps: see `load_clip`.
        limit: frames from the beginning; None: all, within `MAX_BYTES`.
        last: keep the last so many frames alone.

    Raises:
        InputError: see `load_clip`.
    """
    with _named(source):
        fitted = (fit_picture(frame, height, width) for frame in _frames(source, fps))
        return list(bounded(fitted, limit) if last is None else deque(fitted, last))


def _frames(source: Clip, fps: float | None) -> Iterator[Image.Image]:
    """Yield the frames of a source, at least one."""
    empty = True
    for frame in _decoded(source, fps):
        empty = False
        yield frame
    if empty:
        raise InputError("it holds no frame")


def _decoded(source: Clip, fps: float | None) -> Iterator[Image.Image]:
    if isinstance(source, (str, Path)):
        with open_video(source) as video:
            pictures: Iterator[Array] = (frame for _, frame in video)
            if fps is not None and abs(video.rate - fps) > SAME_RATE * fps:
                logger.info(
                    "video %s has %.6g frames a second and the request %.6g: the frame nearest to each time is taken",
                    source, video.rate, fps,
                )  # fmt: skip
                pictures = resample(video, fps, video.rate)
            yield from map(Image.fromarray, pictures)
    elif isinstance(source, np.ndarray):
        if source.ndim != 4:
            raise InputError(f"it is an array of shape {list(source.shape)}; it should be [T, H, W, 3]")
        yield from map(load_picture, source)
    elif isinstance(source, Sequence):
        yield from map(load_picture, source)
    else:
        raise InputError(f"it is of type {type(source).__name__}; give a path, an array or a list of pictures")


def bounded(frames: Iterator[Any], limit: int | None = None) -> Iterator[Any]:
    """Yield the first `limit` frames, or all of them while their pixels are within `MAX_BYTES`."""
    if limit is not None:
        yield from islice(frames, limit)
        return
    for count, frame in enumerate(frames, 1):
        height, width = frame.shape[:2] if isinstance(frame, np.ndarray) else (frame.height, frame.width)
        if count * height * width * 3 > MAX_BYTES:
            raise InputError(
                f"it has more than {count - 1} frames of {width}x{height}, {MAX_BYTES >> 30} GiB of pixels; cut it or "
                "scale it down, or give num_frames= where it is an input"
            )
        yield frame


@contextlib.contextmanager
def _named(source: Clip) -> Generator[None, None, None]:
    """Put the name of a source before what is wrong with it."""
    try:
        yield
    except InputError as error:
        name = f"video {source}" if isinstance(source, (str, Path)) else "the video"
        raise InputError(f"{name}: {error}") from error
