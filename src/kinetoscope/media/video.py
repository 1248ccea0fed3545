"""Videos in and out, through PyAV."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np
from av.codec.context import Flags as CodecFlags
from av.error import FFmpegError

from kinetoscope.core.errors import InputError, OutputError

SUFFIXES = (".mp4",)
CRF = "17"
"""H.264 quality: visually lossless for most footage."""

Frames = np.ndarray[Any, Any]


def check_output(path: str | Path, suffixes: Sequence[str] = SUFFIXES) -> Path:
    """Refuse, before any work, a path that could not be written later.

    Raises:
        OutputError: unknown suffix, a directory, or a place that cannot be created or written.
    """
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise OutputError(
            f"output {path}: cannot write {path.suffix or 'a file without suffix'}; use {', '.join(suffixes)}"
        )
    if path.is_dir():
        raise OutputError(f"output {path} is a directory; name a file in it")
    parent = path.absolute().parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError(f"output {path}: {parent} is not a directory")
    try:  # permission bits do not tell: a superuser passes them, and read-only or virtual file systems do not keep them
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise OutputError(f"output {path}: cannot write in {parent} ({error.strerror})") from error
    return path


def write_video(path: str | Path, frames: Frames, fps: float, *, metadata: dict[str, Any] | None = None) -> Path:
    """Write an H.264 mp4 through a temporary name; the same frames give the same bytes.

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
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _new_mp4(temporary, metadata) as container:
            stream = _add_stream(container, frames, fps)
            _encode(container, stream, frames)
            container.mux(stream.encode())
        temporary.replace(path)
    except (OSError, FFmpegError) as error:
        raise OutputError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
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
        self._part = self.path.with_name(f".{self.path.stem}.part{self.path.suffix}")
        self._whole = self.path.with_name(f".{self.path.stem}.whole{self.path.suffix}")
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
            raise OutputError(f"{self.path} cannot be written: {error}") from error

    def finish(self, metadata: dict[str, Any] | None = None) -> Path:
        """The finished file; `metadata` as in `write_video`.

        Raises:
            OutputError: it cannot be written; or no frames were.
        """
        if self._container is None:
            raise OutputError(f"{self.path}: no frames have been written")
        try:
            self._container.mux(self._stream.encode())
            self._container.close()
            self._container = None
            if metadata is None:
                self._part.replace(self.path)
            else:
                self._copy_with(metadata)
                self._whole.replace(self.path)
        except (OSError, FFmpegError) as error:
            raise OutputError(f"{self.path} cannot be written: {error}") from error
        return self.path

    def _copy_with(self, metadata: dict[str, Any]) -> None:
        """The packets as they are under a new header: a container's metadata must be known before its first frame."""
        with av.open(str(self._part)) as source, _new_mp4(self._whole, metadata) as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:  # the last packet only says that there are no more
                    packet.stream = stream
                    target.mux(packet)

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
            self._whole.unlink(missing_ok=True)


def _check_frames(frames: Frames) -> None:
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise InputError(f"frames are {frames.dtype} {frames.shape}; a video needs uint8 [T, H, W, 3]")
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise InputError(f"frames are {frames.shape[2]}x{frames.shape[1]}; H.264 needs even width and height")


def _new_mp4(path: Path, metadata: dict[str, Any] | None) -> Any:
    # use_metadata_tags keeps the comment whole
    container = av.open(str(path), "w", format="mp4", options={"movflags": "use_metadata_tags+faststart"})
    if metadata is not None:
        container.metadata["comment"] = json.dumps(metadata, sort_keys=True)
    return container


def _add_stream(container: Any, frames: Frames, fps: float) -> Any:
    """A stream for frames like these. One thread and bitexact make the bytes repeat, and no macroblock tree: in x264's
    core 165 what it finds on a CPU with AVX512 depends on what the memory held before."""
    stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = "yuv420p"
    stream.options = {"crf": CRF, "preset": "medium", "threads": "1", "x264-params": "mbtree=0"}
    stream.thread_count = 1
    stream.codec_context.flags |= CodecFlags.bitexact
    return stream


def _encode(container: Any, stream: Any, frames: Frames) -> None:
    for frame in frames:
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))


def read_video(path: str | Path) -> tuple[Frames, float]:
    """(frames uint8 [T, H, W, 3], frames a second).

    Raises:
        InputError: the file is missing, truncated, or holds no video.
    """
    try:
        with _open(path) as container:
            stream = container.streams.video[0]
            frames = [f.to_ndarray(format="rgb24") for f in container.decode(stream)]
            rate = float(stream.average_rate or 0)
    except (FFmpegError, IndexError) as error:
        raise InputError(f"{path} is not a readable video ({error})") from error
    if not frames:
        raise InputError(f"{path} holds no frames")
    return np.stack(frames), rate


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata `write_video` stored.

    Raises:
        InputError: the file is missing, is no video, or has no metadata of ours.
    """
    try:
        with _open(path) as container:
            text = container.metadata.get("comment")
    except FFmpegError as error:
        raise InputError(f"{path} is not a readable video ({error})") from error
    try:
        value = json.loads(text or "")
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise InputError(f"{path} carries no record of how it was made; only videos written by kinetoscope do")
    return value


def _open(path: str | Path) -> Any:
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist" if not Path(path).exists() else f"{path} is not a file")
    return av.open(str(path))
