"""What text and image stages share: a memory of encoded prompts, texts as rows of one length, images for encoders."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from kinetoscope.pipelines.stages.text import CACHE_SIZE

T = TypeVar("T")


class PromptCache(Generic[T]):
    """What the last `CACHE_SIZE` distinct prompts were encoded to."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, T] = OrderedDict()

    def get(self, prompt: str, encode: Callable[[], T]) -> T:
        """The prompt's encoding, made by `encode` if it is not known."""
        if prompt not in self._kept:
            self._kept[prompt] = encode()
            if len(self._kept) > CACHE_SIZE:
                self._kept.popitem(last=False)
        self._kept.move_to_end(prompt)
        return self._kept[prompt]


def pad_rows(rows: Sequence[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Texts [n, D] as one [B, length, D], zero beyond the true lengths [B] (int64, CPU)."""
    padded = [nn.functional.pad(row, (0, 0, 0, length - len(row))) for row in rows]
    return torch.stack(padded), torch.tensor([len(row) for row in rows])


def to_picture(image: Tensor) -> Image.Image:
    """An image [3, H, W] in [-1, 1] as encoders' processors take it."""
    pixels = image.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
