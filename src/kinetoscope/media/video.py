"""Videos in and out, through PyAV."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np
from av.codec.context import Flags as CodecFlags
from av.error import FFmpegError
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from kinetoscope.core.errors import InputError, OutputError
from kinetoscope.core.files import check_output_path, replacing, system_reason, temporary_beside
from kinetoscope.media.clips import bounded
from kinetoscope.media.decoding import SWS, open_container, open_video

SUFFIXES = (".mp4",)
CRF = "17"
"""H.264 quality: visually lossless for most footage."""

Frames = np.ndarray[Any, Any]


def check_output(path: str | Path, suffixes: Sequence[str] = SUFFIXES) -> Path:
    """Return `path` if a file can be written there later.

    Raises:
        OutputError: unknown suffix; or see `core.files.check_output_path`.
    """
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        what = repr(path.suffix) if path.suffix else "a file without suffix"
        raise OutputError(f"output {str(path)!r}: cannot write {what}; use {', '.join(suffixes)}")
    return check_output_path(path)


def write_video(path: str | Path, frames: Frames, fps: float, *, metadata: dict[str, Any] | None = None) -> Path:
    """Write an H.264 mp4 through a temporary name; the same frames give the same bytes.

    Colours are BT.709 in limited range, and tagged so.

    Args:
        path: an .mp4 file; its folder is made if need be.
        frames: uint8 [T, H, W, 3], H and W even.
        fps: frames a second.
        metadata: stored as JSON in the container's comment; `read_metadata` gives it back.

    Raises:
        InputError: the frames have another shape or kind.
        OutputError: the file cannot be written; nothing is left behind.
    """
    path = check_output(path)
    _check_frames(frames)
    try:
        with replacing(path) as temporary, _new_mp4(temporary, metadata) as container:
            stream = _add_stream(container, frames, fps)
            _encode(container, stream, frames)
            container.mux(stream.encode())
    except FFmpegError as error:
        raise OutputError(f"{path} cannot be written: {system_reason(error)}") from error
    return path


class VideoWriter:
    """Writes an mp4 as its frames come, under a temporary name; a context manager.

    The file is there once `finish` has returned. Leaving the context before, in whatever way, leaves nothing behind.

    Args:
        path: an .mp4 file; its folder is made with the first frames.
        fps: frames a second.

    Raises:
        OutputError: the file cannot be written.
    """

    def __init__(self, path: str | Path, fps: float) -> None:
        self.path = check_output(path)
        self.fps = fps
        self._part = temporary_beside(self.path)
        self._container: Any = None
        self._stream: Any = None

    def write(self, frames: Frames) -> None:
        """Add frames, uint8 [T, H, W, 3], H and W even, always the same.

        Raises:
            InputError: the frames have another shape or kind.
            OutputError: they cannot be written.
        """
        _check_frames(frames)
        try:
            if self._container is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._container = _new_mp4(self._part, None)
                self._stream = _add_stream(self._container, frames, self.fps)
            elif frames.shape[1:3] != (self._stream.height, self._stream.width):
                raise InputError(f"frames are {frames.shape[2]}x{frames.shape[1]}; those before had another size")
            _encode(self._container, self._stream, frames)
        except (OSError, FFmpegError) as error:
            raise OutputError(f"{self.path} cannot be written: {system_reason(error)}") from error

    def finish(self, metadata: dict[str, Any] | None = None) -> Path:
        """Return the finished file; `metadata` as in `write_video`.

        Raises:
            OutputError: it cannot be written; or no frames were.
        """
        if self._container is None:
            raise OutputError(f"{self.path}: no frames have been written")
        try:
            self._container.mux(self._stream.encode())
            self._container.close()
            self._container = None
            with replacing(self.path) as whole:
                _copy_with(metadata, self._part, whole)
        except (OSError, FFmpegError) as error:
            raise OutputError(f"{self.path} cannot be written: {system_reason(error)}") from error
        return self.path

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._container is not None:
                self._container.close()
        except (OSError, FFmpegError):  # of a file that is thrown away
            pass
        finally:
            self._part.unlink(missing_ok=True)


def _check_frames(frames: Frames) -> None:
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise InputError(f"frames are {frames.dtype} {frames.shape}; a video needs uint8 [T, H, W, 3]")
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise InputError(f"frames are {frames.shape[2]}x{frames.shape[1]}; H.264 needs even width and height")


def _copy_with(metadata: dict[str, Any] | None, part: Path, whole: Path) -> None:
    """Write the packets of `part` under a new header: a container's metadata must be known before its first frame."""
    with open_container(part) as source, _new_mp4(whole, metadata) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:  # the last packet only says that there are no more
                packet.stream = stream
                target.mux(packet)


def _new_mp4(path: Path, metadata: dict[str, Any] | None) -> Any:
    # an absolute path, since FFmpeg takes what stands before a colon for a protocol; use_metadata_tags keeps the
    # comment whole
    options = {"movflags": "use_metadata_tags+faststart"}
    container = av.open(str(path.absolute()), "w", format="mp4", options=options)
    if metadata is not None:
        container.metadata["comment"] = json.dumps(metadata, sort_keys=True)
    return container


def _add_stream(container: Any, frames: Frames, fps: float) -> Any:
    """Return a stream for frames like these. One thread and bitexact make the bytes repeat, and no macroblock tree: in
    x264's core 165 what it finds on a CPU with AVX512 depends on what the memory held before."""
    if not (math.isfinite(fps) and fps > 0):
        raise InputError(f"fps={fps} is not a positive number of frames a second")
    stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = "yuv420p"
    stream.options = {"crf": CRF, "preset": "medium", "threads": "1", "x264-params": "mbtree=0"}
    stream.thread_count = 1
    context = stream.codec_context
    context.flags |= CodecFlags.bitexact
    context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
    context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
    return stream


def _encode(container: Any, stream: Any, frames: Frames) -> None:
    for frame in frames:
        rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        yuv = rgb.reformat(
            format="yuv420p", src_color_range=ColorRange.JPEG, dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG, dst_color_primaries=ColorPrimaries.BT709, dst_color_trc=ColorTrc.BT709,
            interpolation=SWS, threads=1,
        )  # fmt: skip
        container.mux(stream.encode(yuv))


def read_video(path: str | Path) -> tuple[Frames, float]:
    """Return (frames uint8 [T, H, W, 3], frames a second), all frames of a file by number.

    Raises:
        InputError: the file is missing, truncated, holds no video, or one that is too large.
    """
    try:
        with open_video(path) as video:
            frames, rate = list(bounded(frame for _, frame in video)), video.rate
    except InputError as error:
        raise InputError(f"{path} is not a readable video: {error}") from error
    if not frames:
        raise InputError(f"{path} holds no frames")
    return np.stack(frames), rate


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return the metadata that `write_video` stored.

    Raises:
        InputError: the file is missing, is no video, or has no metadata of ours.
    """
    try:
        with open_container(path) as container:
            text = container.metadata.get("comment")
    except InputError as error:
        raise InputError(f"{path} is not a readable video: {error}") from error
    try:
        value = json.loads(text or "")
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise InputError(f"{path} carries no record of how it was made; only videos written by kinetoscope do")
    return value
