"""What text and image stages share: two text encoders, texts as rows of one length, images for encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from kinetoscope.core.errors import InputError
from kinetoscope.pipelines.lazy import Lazy, resolve
from kinetoscope.pipelines.stages.base import Stage
from kinetoscope.pipelines.stages.prompt_cache import PromptCache


class TwoTextStage(Stage):
    """A stage that reads prompts with a causal language model and with a second encoder.

    Args:
        tokenizer, text_encoder: of the language model, or lazy.
        tokenizer_2, text_encoder_2: of the other encoder, or lazy.
    """

    def __init__(
        self,
        tokenizer: Any | Lazy[Any],
        text_encoder: nn.Module | Lazy[nn.Module],
        tokenizer_2: Any | Lazy[Any],
        text_encoder_2: nn.Module | Lazy[nn.Module],
    ) -> None:
        self._tokenizer = tokenizer
        self._text_encoder = text_encoder
        self._tokenizer_2 = tokenizer_2
        self._text_encoder_2 = text_encoder_2
        self._cache = PromptCache[tuple[Tensor, Tensor]]()

    def hidden_state(self, ids: Tensor, layer: int, **images: Tensor) -> Tensor:
        """[n, D] of one layer of the language model, from tokens [1, n].

        The model is causal, so padding behind the prompt would change nothing and is left out.
        """
        states = resolve(self._text_encoder)(
            input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, **images
        ).hidden_states
        return states[layer][0]


def check_length(count: int, most: int) -> None:
    """Refuse a prompt of more tokens than the model reads.

    Raises:
        InputError: it has more.
    """
    if count > most:
        raise InputError(f"the prompt has {count} tokens and the model reads at most {most}; shorten it")


def first_frame_condition(z: Tensor, frames: int) -> Tensor:
    """Latents [B, C, 1, h, w] of a given first frame and a mask of given frames, zero after it: [B, C + 1, T, h, w]"""
    first = torch.cat([z, torch.ones_like(z[:, :1])], dim=1)
    return nn.functional.pad(first, (0, 0, 0, 0, 0, frames - 1))


def pad_rows(rows: Sequence[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Texts [n, D] as one [B, length, D], zero beyond the true lengths [B] (int64, CPU)."""
    padded = [nn.functional.pad(row, (0, 0, 0, length - len(row))) for row in rows]
    return torch.stack(padded), torch.tensor([len(row) for row in rows])


def to_picture(image: Tensor) -> Image.Image:
    """An image [3, H, W] in [-1, 1] as encoders' processors take it."""
    pixels = image.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
