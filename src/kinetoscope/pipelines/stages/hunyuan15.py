"""Stages of HunyuanVideo 1.5: a chat model reads the prompt, a letter model what the prompt quotes."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from kinetoscope.core.errors import InputError
from kinetoscope.core.types import ExecutionArgs, ForwardBatch
from kinetoscope.models.hunyuan15 import spec
from kinetoscope.models.hunyuan15.strategy import Hunyuan15Inputs
from kinetoscope.pipelines.lazy import Lazy, resolve
from kinetoscope.pipelines.stages.base import Stage
from kinetoscope.pipelines.stages.encoded import (
    TwoTextStage,
    check_length,
    first_frame_condition,
    pad_rows,
    to_picture,
)
from kinetoscope.pipelines.stages.scaled_vae import encode_images

QUOTED = re.compile(r'"(.*?)"|“(.*?)”')


def quoted_text(prompt: str) -> str | None:
    """What a prompt asks to be written in the video, as the letter model was trained to read it; None for nothing."""
    found = dict.fromkeys(straight or curly for straight, curly in QUOTED.findall(prompt))
    return "".join(f'Text "{text}". ' for text in found) or None


class Hunyuan15TextEncodingStage(TwoTextStage):
    """Fills text embeddings and true lengths, and `family` with the quoted text.

    Args:
        tokenizer, text_encoder: of a Qwen2.5-VL language model, or lazy.
        tokenizer_2, text_encoder_2: of ByT5, or lazy.
    """

    @torch.no_grad()
    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """Each distinct prompt is encoded once and stays for later batches."""
        (batch.prompt_embeds, batch.prompt_lengths), glyphs = self.encode(batch.prompts, args.device)
        batch.family = Hunyuan15Inputs(*glyphs)
        if batch.params.guidance_scale != 1.0:
            (batch.negative_embeds, batch.negative_lengths), glyphs = self.encode(batch.negative_prompts, args.device)
            batch.family.negative_glyphs, batch.family.negative_glyph_lengths = glyphs
        return batch

    def encode(self, prompts: list[str], device: torch.device) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Embeddings [B, L, D] and true lengths [B] of the prompts, then of what they quote.

        Raises:
            InputError: a prompt is longer than the model reads.
        """
        pairs = [self._cache.get(p, lambda p=p: (self._words(p, device), self._glyphs(p, device))) for p in prompts]
        words, glyphs = zip(*pairs, strict=True)
        return pad_rows(words, spec.TEXT_LENGTH), pad_rows(glyphs, spec.GLYPH_LENGTH)

    def _words(self, prompt: str, device: torch.device) -> Tensor:
        """[n, D]"""
        chat = [{"role": "system", "content": spec.SYSTEM_MESSAGE}, {"role": "user", "content": prompt or " "}]
        ids = resolve(self._tokenizer).apply_chat_template(
            [chat], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )["input_ids"]
        check_length(ids.shape[1] - spec.TEMPLATE_TOKENS, spec.TEXT_LENGTH)
        return self.hidden_state(ids.to(device), spec.HIDDEN_STATE)[spec.TEMPLATE_TOKENS :]

    def _glyphs(self, prompt: str, device: torch.device) -> Tensor:
        """[g, D], g = 0 for a prompt that quotes nothing; of long quotes the first `GLYPH_LENGTH` tokens are read."""
        encoder: Any = resolve(self._text_encoder_2)
        text = quoted_text(prompt)
        if text is None:
            return torch.zeros(0, encoder.config.d_model, device=device)
        ids = resolve(self._tokenizer_2)(
            text, max_length=spec.GLYPH_LENGTH, truncation=True, add_special_tokens=True, return_tensors="pt"
        ).input_ids.to(device)
        return encoder(input_ids=ids, attention_mask=torch.ones_like(ids).float())[0][0]


class Hunyuan15ImageStage(Stage):
    """Fills `image_embeds` with features of the image, and `condition` with its latents as the first frame.

    Args:
        feature_extractor, image_encoder: of SigLIP, or lazy.
        vae: encodes the image, or lazy.
    """

    def __init__(
        self,
        feature_extractor: Any | Lazy[Any],
        image_encoder: nn.Module | Lazy[nn.Module],
        vae: Any | Lazy[Any],
    ) -> None:
        self._feature_extractor = feature_extractor
        self._image_encoder = image_encoder
        self._vae = vae

    @torch.no_grad()
    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The batch with `image_embeds` [B, N, D] and `condition` [B, C + 1, T, h, w]: latents, then their mask."""
        if batch.image is None:
            raise InputError("this model makes videos from an image; give image=")
        assert batch.latents is not None
        encoder = resolve(self._image_encoder)
        pixels = resolve(self._feature_extractor).preprocess(
            images=[to_picture(image) for image in batch.image],
            do_resize=True,
            do_convert_rgb=True,
            return_tensors="pt",
        )["pixel_values"]
        batch.image_embeds = encoder(pixels.to(next(encoder.parameters()))).last_hidden_state
        z = encode_images(resolve(self._vae), batch.image)  # [B, C, 1, h, w]
        batch.condition = first_frame_condition(z, batch.latents.shape[2])
        return batch
