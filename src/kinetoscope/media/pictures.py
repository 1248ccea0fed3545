"""Pictures and videos given by the user, as arrays of the size a request needs."""

from __future__ import annotations

import io
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from PIL import Image, ImageOps, UnidentifiedImageError

from kinetoscope.core.errors import InputError

Array = np.ndarray[Any, Any]
Picture = str | Path | Image.Image | Array
Clip = str | Path | Array | Sequence[Any]

MAX_DOWNLOAD = 64 * 2**20
TIMEOUT_S = 30.0


def load_picture(source: Picture) -> Image.Image:
    """An RGB picture, turned as its EXIF orientation says; transparency is laid on black.

    Args:
        source: a path, an http(s) address, a PIL image, or an array [H, W, 3] or [H, W] (uint8, or floats in [0, 1]).

    Raises:
        InputError: it cannot be read, or is no picture.
    """
    if isinstance(source, np.ndarray):
        return Image.fromarray(_as_uint8(source, "an image"))
    if isinstance(source, Image.Image):
        image = source
    elif isinstance(source, (str, Path)):
        try:
            image = Image.open(io.BytesIO(_read(source)))
            image.load()
        except UnidentifiedImageError as error:
            raise InputError(f"image {source} is not a picture in a known format") from error
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"image {source} cannot be read: {error}") from error
    else:
        raise InputError(f"image of type {type(source).__name__}; give a path, an address, a PIL image or an array")
    try:
        turned = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError) as error:  # an image that was opened elsewhere is first read here
        raise InputError(f"image {source} cannot be read: {error}") from error
    if turned.mode.startswith("I;16"):  # Pillow's conversion would cut these off at 255
        turned = Image.fromarray(((np.asarray(turned).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if turned.mode in ("RGBA", "LA", "PA") or "transparency" in turned.info:
        turned = turned.convert("RGBA")
        black = Image.new("RGBA", turned.size, (0, 0, 0, 255))
        turned = Image.alpha_composite(black, turned)
    return turned.convert("RGB")


def fit_picture(image: Image.Image, height: int, width: int) -> Array:
    """uint8 [height, width, 3]: cut evenly to the proportions of the size, then scaled (Lanczos)."""
    scale = max(height / image.height, width / image.width)
    across, down = width / scale, height / scale
    left, top = (image.width - across) / 2, (image.height - down) / 2
    box = (max(left, 0.0), max(top, 0.0), min(left + across, image.width), min(top + down, image.height))
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=box))


def load_clip(source: Clip, limit: int | None = None) -> list[Image.Image]:
    """The frames of a video, at most `limit` of them.

    Args:
        source: a file, an array [T, H, W, 3] (uint8, or floats in [0, 1]), or a list of pictures.

    Raises:
        InputError: it cannot be read, or holds no frame.
    """
    if isinstance(source, np.ndarray):
        if source.ndim != 4:
            raise InputError(f"a video array has shape {list(source.shape)}; it should be [T, H, W, 3]")
        frames = [load_picture(frame) for frame in source[:limit]]
    elif isinstance(source, (str, Path)):
        frames = _decode(Path(source), limit)
    elif isinstance(source, Sequence):
        frames = [load_picture(frame) for frame in source[:limit]]
    else:
        raise InputError(f"video of type {type(source).__name__}; give a path, an array or a list of pictures")
    if not frames:
        raise InputError(f"video {source if isinstance(source, (str, Path)) else ''} holds no frame")
    return frames


def _decode(path: Path, limit: int | None) -> list[Image.Image]:
    frames: list[Image.Image] = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"video {path} has no picture track")
            for frame in container.decode(video=0):
                image = Image.fromarray(frame.to_ndarray(format="rgb24"))
                frames.append(image.rotate(frame.rotation, expand=True) if frame.rotation else image)
                if limit is not None and len(frames) == limit:
                    break
    except (FFmpegError, OSError) as error:
        raise InputError(f"video {path} cannot be read: {error}") from error
    return frames


def _read(source: str | Path) -> bytes:
    """The bytes of a file or of an http(s) address."""
    if not str(source).startswith(("http://", "https://")):
        return Path(source).read_bytes()
    with urllib.request.urlopen(str(source), timeout=TIMEOUT_S) as response:
        data = response.read(MAX_DOWNLOAD + 1)
    if len(data) > MAX_DOWNLOAD:
        raise InputError(f"image {source} is larger than {MAX_DOWNLOAD >> 20} MB")
    return data


def _as_uint8(array: Array, what: str) -> Array:
    """[H, W, 3] uint8."""
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=2)
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise InputError(f"{what} has shape {list(array.shape)}; it should be [H, W, 3] or [H, W]")
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"{what} holds {array.dtype}; it should hold uint8, or floats in [0, 1]")
    if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
        raise InputError(f"{what} holds floats outside [0, 1]")
    return np.round(array * 255).astype(np.uint8)
