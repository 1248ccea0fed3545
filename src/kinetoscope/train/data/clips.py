"""Frames of a clip at the times and in the size that a bucket asks for, or a reason why there are none."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from kinetoscope.core.errors import InputError
from kinetoscope.media import fit_picture
from kinetoscope.media.decoding import VideoReader, open_video, resample
from kinetoscope.train.data.buckets import Buckets
from kinetoscope.train.data.sources import Item
from kinetoscope.worlds import get_world


@dataclass(frozen=True, eq=False)
class Window:
    """Frames that make one row.

    Attributes:
        frames: uint8 [T, H, W, 3], of a bucket's shape.
        caption: as it was found; a world's is made with its clip.
        index: which window of its clip.
        start: seconds from the beginning of the clip.
        source_height, source_width, source_fps: of the clip before it was cut and scaled.
    """

    frames: np.ndarray[Any, Any]
    caption: str
    index: int
    start: float
    source_height: int
    source_width: int
    source_fps: float


@dataclass(frozen=True)
class Cut:
    """How clips become windows.

    Attributes:
        buckets: shapes.
        fps: frames a second of the windows.
        every: cut long clips into as many windows as they give, not one.
        upscale: take clips that are smaller than their bucket.
        uncaptioned: take clips without a caption.
        world: the world that draws the items, if one does.
        split: of the world's captions.
    """

    buckets: Buckets
    fps: float
    every: bool = False
    upscale: bool = False
    uncaptioned: bool = False
    world: str | None = None
    split: str = "train"


def windows_of(item: Item, cut: Cut) -> list[Window]:
    """Return the windows of an item, at least one; see `iterate_windows`."""
    return list(iterate_windows(item, cut))


def iterate_windows(item: Item, cut: Cut) -> Iterator[Window]:
    """Yield the windows of an item, at least one; no more frames are held than the longest bucket has.

    Raises:
        InputError: the reason why the item cannot be used; it may come after some windows.
    """
    if item.problem:
        raise InputError(item.problem)
    if cut.world is not None:
        yield _drawn(item, cut)
        return
    caption = item.read_caption()
    if not caption.strip() and not cut.uncaptioned:
        raise InputError("it has no caption" if item.caption is None else "its caption is empty")
    with _opened(item) as video:
        yield from _cut(video, caption, cut)


def _cut(video: VideoReader, caption: str, cut: Cut) -> Iterator[Window]:
    """Yield windows of the longest length, then what the rest of the clip gives."""
    longest = cut.buckets.frames[-1]
    total = start = index = 0
    size: tuple[int, int] | None = None
    source = (0, 0)
    held: list[np.ndarray[Any, Any]] = []

    def window(count: int) -> Window:
        return Window(np.stack(held[:count]), caption, index, start / cut.fps, *source, video.rate or cut.fps)

    for frame in resample(video, cut.fps, video.rate):
        if size is None:
            source = frame.shape[0], frame.shape[1]
            size = cut.buckets.size_for(*source)
            _check_size(source, size, cut)
        held.append(fit_picture(Image.fromarray(frame), *size))
        total += 1
        if len(held) == longest:
            yield window(longest)
            index, start, held = index + 1, start + longest, []
            if not cut.every:
                break
    if size is None:
        raise InputError("it holds no frames")
    for _, count in cut.buckets.windows(len(held), cut.every) if cut.every or not index else ():
        yield window(count)
        index, start, held = index + 1, start + count, held[count:]
    if not index:
        raise InputError(
            f"it has {total} of the {cut.buckets.frames[0]} frames that the shortest bucket needs, at {cut.fps:g} a "
            "second"
        )


def _check_size(source: tuple[int, int], size: tuple[int, int], cut: Cut) -> None:
    """Refuse a clip that would have to be scaled up, unless the cut allows it."""
    if (source[0] < size[0] or source[1] < size[1]) and not cut.upscale:
        raise InputError(
            f"it is {source[0]}x{source[1]}, smaller than its bucket {size[0]}x{size[1]}; such clips are scaled up "
            "only on request"
        )


def _drawn(item: Item, cut: Cut) -> Window:
    """A world's clip; the items take the buckets in turn."""
    assert cut.world is not None
    every = list(cut.buckets)
    bucket = every[item.seed % len(every)]
    clip = get_world(cut.world).sample(
        item.seed, cut.split, height=bucket.height, width=bucket.width, num_frames=bucket.frames
    )
    return Window(clip.frames, clip.caption, 0, 0.0, bucket.height, bucket.width, cut.fps)


def read_pictures(item: Item, fps: float, limit: int | None = None) -> tuple[float, list[Image.Image]]:
    """Return (frames a second of the file, the pictures nearest to the times 0, 1 / fps, 2 / fps, ...).

    Args:
        item: of a file.
        fps: pictures a second.
        limit: how many at most.

    Raises:
        InputError: the file is missing, is no video, is damaged before the last picture that is needed, or changes
            its size.
    """
    with _opened(item) as video:
        pictures = [Image.fromarray(p) for p in islice(resample(video, fps, video.rate), limit)]
    if not pictures:
        raise InputError("it holds no frames")
    return video.rate or fps, pictures


@contextlib.contextmanager
def _opened(item: Item) -> Generator[VideoReader, None, None]:
    """Open the video of an item."""
    assert item.video is not None
    try:
        file = item.video.open()
    except FileNotFoundError as error:
        raise InputError("the file does not exist") from error
    except OSError as error:
        raise InputError(f"it cannot be read as a video: {error.strerror or error}") from error
    with file, open_video(file) as video:
        yield video
