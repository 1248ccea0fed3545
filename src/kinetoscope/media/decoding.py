"""The decoder of every video file: upright RGB frames of square pixels with their times, one at a time."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Generator, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from av.error import FFmpegError
from av.sidedata.sidedata import Type as SideDataType
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from PIL import Image

from kinetoscope.core.errors import InputError
from kinetoscope.media.download import is_address

Array = np.ndarray[Any, Any]
TimedFrame = tuple[float, Array]
"""Seconds from the first frame, and uint8 [H, W, 3]."""

MAX_PIXELS = 2**26
"""Largest frame, twice 8K."""
HD_HEIGHT = 720
"""From this coded height on a file without a tag has the BT.709 matrix, below it BT.601, as players decide."""
SWS = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.BITEXACT | Interpolation.FULL_CHR_H_INT
"""Flags of swscale with which every CPU gives the same pixels."""

# Numbers of ITU-T H.273.
_UNSPECIFIED = 2
_MATRICES = {1: Colorspace.ITU709, 4: Colorspace.FCC, 5: Colorspace.ITU601, 6: Colorspace.ITU601,
             7: Colorspace.SMPTE240M, 9: Colorspace.BT2020}  # fmt: skip
_HDR = {16: "PQ", 18: "HLG"}
_BT2020_PRIMARIES = 9


class VideoReader:
    """A video file that is open for reading; made by `open_video`.

    Iterating yields (seconds from the first frame, uint8 [H, W, 3]): frames that an edit list hides are left out, the
    display matrix is applied (turned and mirrored), pixels are made square, transparency is laid on black.

    Attributes:
        rate: frames a second on average; 0.0 if the file does not tell.

    Raises:
        InputError: the reason why the file cannot be read; it begins with "it" and does not name the file.
    """

    def __init__(self, container: Any) -> None:
        if not container.streams.video:
            raise InputError("it has no video track")
        self._container, self._stream = container, container.streams.video[0]
        self.rate = float(self._stream.average_rate or self._stream.guessed_rate or 0)
        context = self._stream.codec_context
        if context is None:
            raise InputError("it is in a format that this build of FFmpeg cannot decode; convert it to H.264")
        _check_pixels(context.width, context.height)
        if self._stream.metadata.get("alpha_mode") == "1":
            raise InputError("its transparency (alpha_mode) is not read; lay it on a background first")

    def __iter__(self) -> Iterator[TimedFrame]:
        aspect = self._stream.sample_aspect_ratio or self._stream.codec_context.sample_aspect_ratio or Fraction(1)
        first: float | None = None
        size: tuple[int, int] | None = None
        for count, frame in enumerate(self._decode()):
            if frame.time is None and not self.rate:
                raise InputError(f"its frame {count} has no time, and the file tells no rate; convert it to mp4")
            time: float = count / self.rate if frame.time is None else frame.time
            first = time if first is None else first
            size = size or (frame.width, frame.height)
            if size != (frame.width, frame.height):
                raise InputError(
                    f"its frames are of several sizes: {size[0]}x{size[1]}, then {frame.width}x{frame.height}"
                )
            yield time - first, _upright(_square(to_rgb(frame), aspect), frame)

    def _decode(self) -> Iterator[Any]:
        """Frames that are shown; an end before the duration that the file declares is damage."""
        stream, packets, count = self._stream, 0, 0
        begin: Fraction | int | None = None
        end: Fraction | int = 0
        for packet in self._container.demux(stream):
            if packet.is_corrupt:
                raise InputError(f"it is truncated or damaged after {count} frames")
            if packet.size:
                packets += 1
                if packet.pts is not None and not packet.is_discard:
                    begin = packet.pts if begin is None else min(begin, packet.pts)
                    end = max(end, packet.pts + (packet.duration or 0))
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise InputError(f"it is damaged at frame {count}")
                yield frame
                count += 1
        if packets < stream.frames and self._ends_early(end - (begin or 0)):  # an edit list may leave packets out
            raise InputError(f"it is truncated: {packets} of {stream.frames} frames are there")

    def _ends_early(self, covered: Fraction | int) -> bool:
        """Whether frames that cover so many ticks end before the track does."""
        stream = self._stream
        if stream.duration is None or not stream.time_base or not self.rate:
            return True
        return float((stream.duration - covered) * stream.time_base) > 0.5 / self.rate


@contextlib.contextmanager
def open_video(source: str | Path | BinaryIO) -> Generator[VideoReader, None, None]:
    """Open a video file, by its path or as an open binary file; use it as a context manager.

    The file is read through Python, so that no part of its name is taken for a protocol of FFmpeg.

    Raises:
        InputError: the reason why the file cannot be read, also of an error within the context: it begins with "it" or
            "the file" and does not name the file.
    """
    with open_container(source) as container:
        yield VideoReader(container)


@contextlib.contextmanager
def open_container(source: str | Path | BinaryIO) -> Generator[Any, None, None]:
    """Open a container for reading; see `open_video` for its arguments and errors."""
    try:
        with contextlib.ExitStack() as stack:
            if isinstance(source, (str, Path)):
                if is_address(str(source)):
                    raise InputError("it is an address; addresses are read for pictures, so download the video first")
                source = stack.enter_context(Path(source).open("rb"))
            if not source.read(1):
                raise InputError("the file is empty")
            source.seek(0)
            # what the file names in its turn (a playlist) is not opened
            yield stack.enter_context(av.open(source, options={"protocol_whitelist": "none"}))
    except FileNotFoundError as error:
        raise InputError("the file does not exist") from error
    except (FFmpegError, OSError, EOFError, UnicodeError) as error:
        raise InputError(f"it cannot be read as a video: {getattr(error, 'strerror', None) or error}") from error
    except ValueError as error:
        if "null byte" not in str(error):
            raise
        raise InputError("it cannot be read: its name holds a null character") from error


def resample(frames: Iterable[TimedFrame], fps: float, rate: float) -> Iterator[Array]:
    """Yield the frame nearest to each time k / fps; the last frame stays for half a frame of the file.

    Args:
        frames: in the order of their times.
        fps: frames a second to yield.
        rate: frames a second of the file; 0: unknown.
    """
    k = 0
    before: TimedFrame | None = None
    for time, frame in frames:
        while before is not None and k / fps < (before[0] + time) / 2:
            yield before[1]
            k += 1
        before = time, frame
    while before is not None and k / fps < before[0] + 0.5 / (rate or fps):
        yield before[1]
        k += 1


def to_rgb(frame: Any) -> Array:
    """Return a decoded frame as uint8 [H, W, 3] by its matrix and range; transparency is laid on black.

    Raises:
        InputError: the frame is interlaced, HDR, or in a colour space that is not supported.
    """
    if frame.interlaced_frame:
        raise InputError("it is interlaced; deinterlace it first: ffmpeg -i FILE -vf bwdif OUT.mp4")
    if frame.color_trc in _HDR or frame.color_primaries == _BT2020_PRIMARIES:
        kind = _HDR.get(frame.color_trc, "BT.2020")
        raise InputError(
            f"its colours are HDR ({kind}); convert it to BT.709 first: ffmpeg's zscale and tonemap filters"
        )
    _check_pixels(frame.width, frame.height)
    form = frame.format
    alpha = any(c.is_alpha for c in form.components)
    made = frame.reformat(
        format="rgba" if alpha else "rgb24", src_colorspace=_matrix(frame), src_color_range=_range(frame),
        dst_color_range=ColorRange.JPEG, interpolation=SWS, threads=1,
    )  # fmt: skip
    pixels: Array = made.to_ndarray()
    if alpha:
        scaled = pixels[..., :3].astype(np.uint16) * pixels[..., 3:]
        pixels = ((scaled + 127) // 255).astype(np.uint8)
    return pixels


def _matrix(frame: Any) -> int | None:
    """Return the matrix of a frame in swscale's numbers; None for RGB."""
    if frame.format.is_rgb or len(frame.format.components) < 3:
        return None
    tag = int(frame.colorspace)
    if tag == _UNSPECIFIED:
        return int(Colorspace.ITU709 if frame.height >= HD_HEIGHT else Colorspace.ITU601)
    if tag not in _MATRICES:
        raise InputError(f"its colour matrix (number {tag} of H.273) is not supported; convert it to BT.709 first")
    return int(_MATRICES[tag])


def _range(frame: Any) -> int:
    """Return the range of a frame's values; a tag is believed, and YUV without one is limited."""
    if frame.format.is_rgb or frame.format.name.startswith("yuvj"):
        return int(ColorRange.JPEG)
    return int(frame.color_range or ColorRange.MPEG)


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise InputError(
            f"its frames have {width}x{height} pixels, and {MAX_PIXELS >> 20} million are allowed; scale it down"
        )


def _square(pixels: Array, aspect: Fraction) -> Array:
    """Stretch frames whose pixels are `aspect` times as wide as high, along the side that gains pixels."""
    if aspect <= 0 or aspect == 1:
        return pixels
    height, width = pixels.shape[:2]
    width, height = (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))
    _check_pixels(width, height)
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def _upright(pixels: Array, frame: Any) -> Array:
    """Apply the display matrix: x' = a x + c y, y' = b x + d y, in quarter turns and mirrorings.

    Raises:
        InputError: the matrix turns the frame by another angle.
    """
    found = frame.side_data.get(SideDataType.DISPLAYMATRIX)
    if found is None:
        return pixels
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(found))
    turned = abs(b) + abs(c) > abs(a) + abs(d)
    if turned:
        x, y, rest = c, b, max(abs(a), abs(d))
        pixels = pixels.transpose(1, 0, 2)
    else:
        x, y, rest = a, d, max(abs(b), abs(c))
    if rest * 100 > min(abs(x), abs(y)):
        raise InputError("its display matrix is no quarter turn or mirroring; turn the frames themselves first")
    return np.ascontiguousarray(pixels[:: 1 if y > 0 else -1, :: 1 if x > 0 else -1])
