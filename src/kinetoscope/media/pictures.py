"""Pictures given by the user, as RGB of the size a request needs."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from kinetoscope.core.errors import InputError, shown
from kinetoscope.core.files import path_exists, system_reason
from kinetoscope.media.download import fetch_picture, is_address, other_scheme

Array = np.ndarray[Any, Any]
Picture = str | Path | Image.Image | Array

MAX_PIXELS = 2**27
"""Largest picture, before it is decoded."""
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, KeyError, TypeError, OverflowError, Image.DecompressionBombError)
"""What Pillow raises for damaged files."""


def load_picture(source: Picture) -> Image.Image:
    """Return an RGB picture, turned as its EXIF orientation says; transparency is laid on black.

    Of a file with several pictures (GIF, APNG, TIFF) the first is taken; 16-bit greys are scaled to 8 bits.

    Args:
        source: a path, an http(s) address, a PIL image, or an array [H, W, 3] or [H, W] (uint8, or floats in [0, 1]).

    Raises:
        InputError: the source cannot be read, is no picture, or has too many pixels.
    """
    if isinstance(source, np.ndarray):
        return Image.fromarray(_as_uint8(source, "an image"))
    if isinstance(source, Image.Image):
        image, name = source, f"of type {type(source).__name__}"
    elif isinstance(source, (str, Path)):
        image, name = _open(source), str(source)
    else:
        raise InputError(f"image of type {type(source).__name__}; give a path, an address, a PIL image or an array")
    if 0 in image.size:
        raise InputError(f"image {name} has no pixels: it is {image.width}x{image.height}")
    try:  # an image that was opened elsewhere is first read here
        return _as_rgb(ImageOps.exif_transpose(image))
    except _DAMAGE as error:
        raise InputError(f"image {name} cannot be read: {error}") from error


def fit_picture(image: Image.Image, height: int, width: int) -> Array:
    """Return uint8 [height, width, 3]: cut evenly to the proportions of the size, then scaled (Lanczos)."""
    scale = max(height / image.height, width / image.width)
    across, down = width / scale, height / scale
    left, top = (image.width - across) / 2, (image.height - down) / 2
    box = (max(left, 0.0), max(top, 0.0), min(left + across, image.width), min(top + down, image.height))
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=box))


def _open(source: str | Path) -> Image.Image:
    """Return a picture whose file has been read."""
    if (scheme := other_scheme(source)) and not path_exists(source):
        raise InputError(f"image {shown(str(source))}: addresses are http:// or https://, not {scheme}:; give a path")
    try:
        data = fetch_picture(str(source)) if is_address(source) else Path(source).read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is below Pillow's error
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > MAX_PIXELS:
                raise InputError(
                    f"image {source} has {image.width}x{image.height} pixels, and {MAX_PIXELS >> 20} million are "
                    "allowed; scale it down"
                )
            image.load()
    except UnidentifiedImageError as error:
        raise InputError(f"image {source} is not a picture in a known format") from error
    except _DAMAGE as error:
        raise InputError(f"image {source} cannot be read: {system_reason(error)}") from error
    return image


def _as_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode as RGB.

    Raises:
        InputError: the mode holds numbers whose range is not known.
    """
    if image.mode.startswith("I;16"):  # Pillow's conversion would cut these off at 255
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        image = Image.fromarray(_of_numbers(np.asarray(image)))
    if image.mode in ("La", "RGBa"):  # premultiplied: as it is on black
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image)
    return image.convert("RGB")


def _of_numbers(values: Array) -> Array:
    """Return 32-bit greys as uint8: whole numbers of 16 bits, or floats in [0, 1]."""
    top = 65535 if np.issubdtype(values.dtype, np.integer) else 1
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > top:
        raise InputError(f"an image of 32-bit greys holds values outside [0, {top}]; save it in 8 or 16 bits")
    return np.round(values * (255 / top)).astype(np.uint8)


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
