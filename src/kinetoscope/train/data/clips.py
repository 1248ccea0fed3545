"""Frames of a clip at the times and in the size that a bucket asks for, or a reason why there are none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import av
import numpy as np
from av.error import FFmpegError
from PIL import Image

from kinetoscope.core.errors import InputError
from kinetoscope.media import fit_picture
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
    """The windows of an item, at least one.

    Raises:
        InputError: the reason why the item cannot be used.
    """
    if item.problem:
        raise InputError(item.problem)
    if cut.world is not None:
        return [_drawn(item, cut)]
    caption = item.read_caption()
    if not caption.strip() and not cut.uncaptioned:
        raise InputError("it has no caption" if item.caption is None else "its caption is empty")
    assert item.video is not None
    limit = None if cut.every else cut.buckets.frames[-1]
    rate, pictures = read_pictures(item, cut.fps, limit)
    if not (spans := cut.buckets.windows(len(pictures), cut.every)):
        raise InputError(
            f"it has {len(pictures)} of the {cut.buckets.frames[0]} frames that the shortest bucket needs, at "
            f"{cut.fps:g} a second"
        )
    first = pictures[0]
    height, width = cut.buckets.size_for(first.height, first.width)
    if (first.height < height or first.width < width) and not cut.upscale:
        raise InputError(
            f"it is {first.height}x{first.width}, smaller than its bucket {height}x{width}; such clips are scaled up "
            "only on request"
        )
    windows: list[Window] = []
    for index, (start, count) in enumerate(spans):
        frames = np.stack([fit_picture(p, height, width) for p in pictures[start : start + count]])
        windows.append(Window(frames, caption, index, start / cut.fps, first.height, first.width, rate))
    return windows


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
    """(frames a second of the file, the pictures nearest to the times 0, 1 / fps, 2 / fps, ...), at most `limit`.

    Raises:
        InputError: the file is missing, is no video, is damaged before the last picture that is needed, or changes
            its size.
    """
    assert item.video is not None
    try:
        with item.video.open() as file, av.open(_checked(file)) as container:
            if not container.streams.video:
                raise InputError("it has no picture track")
            stream = container.streams.video[0]
            rate = float(stream.average_rate or stream.guessed_rate or 0)
            pictures: list[Image.Image] = []
            for picture in _resample(_decode(container, stream), fps, rate):
                pictures.append(picture)
                if len(pictures) == limit:
                    break
    except FileNotFoundError as error:
        raise InputError("the file does not exist") from error
    except (FFmpegError, OSError, EOFError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"it cannot be read as a video: {why}") from error
    if not pictures:
        raise InputError("it holds no frames")
    if any(p.size != pictures[0].size for p in pictures):
        raise InputError("its frames are of several sizes")
    return rate or fps, pictures


def _checked(file: BinaryIO) -> BinaryIO:
    """The file, which is not empty."""
    if not file.read(1):
        raise InputError("the file is empty")
    file.seek(0)
    return file


def _decode(container: Any, stream: Any) -> Iterator[tuple[float, Image.Image]]:
    """(seconds, picture) of each frame; an end before the number of frames that the file declares is damage."""
    count, first = 0, None
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise InputError(f"it is truncated or damaged after {count} frames")
        for frame in packet.decode():
            if frame.is_corrupt:
                raise InputError(f"it is damaged at frame {count}")
            if frame.time is None:
                raise InputError(f"frame {count} has no time")
            first = frame.time if first is None else first
            image = Image.fromarray(frame.to_ndarray(format="rgb24"))
            yield frame.time - first, image.rotate(frame.rotation, expand=True) if frame.rotation else image
            count += 1
    if count < stream.frames:
        raise InputError(f"it is truncated: {count} of {stream.frames} frames are there")


def _resample(frames: Iterator[tuple[float, Image.Image]], fps: float, rate: float) -> Iterator[Image.Image]:
    """The picture nearest to each time k / fps; the last one stays for half a frame."""
    k = 0
    before: tuple[float, Image.Image] | None = None
    for time, picture in frames:
        while before is not None and k / fps < (before[0] + time) / 2:
            yield before[1]
            k += 1
        before = time, picture
    while before is not None and k / fps < before[0] + 0.5 / (rate or fps):
        yield before[1]
        k += 1
