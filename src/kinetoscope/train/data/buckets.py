"""Buckets: the few sizes and lengths that clips of all kinds are cut to, so that a batch has one shape."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from kinetoscope.core.errors import InputError
from kinetoscope.core.types import SamplingParams
from kinetoscope.pipelines.stages.validation import VideoGeometry


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """One shape of clips: frames, and pixels."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


def aspect_sizes(
    area: tuple[int, int], aspects: Sequence[tuple[float, float]], multiple: int
) -> tuple[tuple[int, int], ...]:
    """Sizes (height, width) of about as many pixels as `area` has, one for each proportion (width, height).

    Each side is rounded to the nearest multiple, and is at least one.
    """
    pixels = area[0] * area[1]
    sizes: list[tuple[int, int]] = []
    for across, down in aspects:
        height = math.sqrt(pixels * down / across)
        rounded = [max(multiple, multiple * round(side / multiple)) for side in (height, pixels / height)]
        sizes.append((rounded[0], rounded[1]))
    return tuple(dict.fromkeys(sizes))


class Buckets:
    """All pairs of a size and a length.

    Args:
        sizes: (height, width) in pixels.
        frames: lengths.
        geometry: of the model; sizes must divide into its tokens.

    Raises:
        InputError: there are none, or a size or length is not one that the model can have.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], frames: Sequence[int], geometry: VideoGeometry) -> None:
        self.sizes, self.frames = sorted(set(sizes)), sorted(set(frames))
        if not self.sizes or not self.frames:
            raise InputError("buckets need at least one size and one number of frames")
        for height, width in self.sizes:
            for length in self.frames:
                geometry.check(replace(SamplingParams(), height=height, width=width, num_frames=length))

    def __iter__(self) -> Iterator[Bucket]:
        return (Bucket(length, *size) for length in self.frames for size in self.sizes)

    def size_for(self, height: int, width: int) -> tuple[int, int]:
        """The size of the nearest proportions (by their logarithm); of several the largest that needs no scaling up,
        else the smallest."""
        clip = math.log(width / height)

        def rank(size: tuple[int, int]) -> tuple[float, bool, int]:
            far = round(abs(math.log(size[1] / size[0]) - clip), 6)
            up = size[0] > height or size[1] > width
            pixels = size[0] * size[1]
            return far, up, pixels if up else -pixels

        return min(self.sizes, key=rank)

    def windows(self, available: int, every: bool) -> list[tuple[int, int]]:
        """(first frame, frames) of the windows that a clip is cut to: the longest length that fits, and if `every`,
        the same again with the rest of the clip until nothing fits. Empty if the clip is too short."""
        found: list[tuple[int, int]] = []
        start = 0
        while fitting := [n for n in self.frames if n <= available - start]:
            found.append((start, fitting[-1]))
            start += fitting[-1]
            if not every:
                break
        return found
