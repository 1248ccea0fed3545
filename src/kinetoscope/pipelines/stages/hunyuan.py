"""Stages of HunyuanVideo: a language model reads the prompt inside a template, CLIP gives one vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kinetoscope.core.errors import InputError
from kinetoscope.core.types import ExecutionArgs, ForwardBatch
from kinetoscope.models.hunyuan import spec
from kinetoscope.models.hunyuan.strategy import HunyuanInputs, true_cfg_scale
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
from kinetoscope.pipelines.stages.validation import MAX_GUIDANCE, InputValidationStage, VideoGeometry


class HunyuanValidationStage(InputValidationStage):
    """Checks the whole request.

    Args:
        geometry: of the model.
        skip: latent frames at the start that are no part of the video.
        keeps_image: whether the image is the first latent frame.
        embeds_guidance: whether the network is told `guidance_scale`.
    """

    def __init__(
        self, geometry: VideoGeometry, skip: int = 0, *, keeps_image: bool = False, embeds_guidance: bool = True
    ) -> None:
        super().__init__(geometry, keeps_image=keeps_image)
        self.embeds_guidance = embeds_guidance
        self.skip = skip

    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The same batch, or an `InputError`."""
        if self.skip and batch.params.num_frames == 1:
            least = 1 + self.geometry.temporal * self.skip
            raise InputError(f"num_frames=1: the first frame is the image and is left out; ask for {least} or more")
        if not self.embeds_guidance and batch.params.guided:
            raise InputError(
                f"guidance_scale={batch.params.guidance_scale}: this network is not told it; use 1, and true_cfg_scale "
                "for classifier-free guidance"
            )
        value = (batch.params.extra or {}).get("true_cfg_scale", 1.0)
        if type(value) not in (int, float) or not 1.0 <= value <= MAX_GUIDANCE:
            raise InputError(
                f"true_cfg_scale={value!r} must be a number in [1, {MAX_GUIDANCE:g}]; 1 switches it off "
                "(guidance_scale is embedded in the network)"
            )
        return super().forward(batch, args)


class HunyuanTextEncodingStage(TwoTextStage):
    """Fills text embeddings and true lengths, and `family` with the pooled text.

    Args:
        tokenizer, text_encoder: of a Llama-like language model, or lazy.
        tokenizer_2, text_encoder_2: of CLIP, or lazy.
    """

    @torch.no_grad()
    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """Each distinct prompt is encoded once and stays for later batches."""
        words, pooled = self.encode(batch.prompts, args.device)
        batch.prompt_embeds, batch.prompt_lengths = pad_rows(words, spec.TEXT_LENGTH)
        batch.family = HunyuanInputs(pooled)
        if true_cfg_scale(batch) != 1.0:
            words, batch.family.negative_pooled = self.encode(batch.negative_prompts, args.device)
            batch.negative_embeds, batch.negative_lengths = pad_rows(words, spec.TEXT_LENGTH)
        return batch

    def encode(self, prompts: Sequence[str], device: torch.device) -> tuple[list[Tensor], Tensor]:
        """Of each prompt its tokens [n, D]; of all the pooled vectors [B, P].

        Raises:
            InputError: a prompt is longer than the model reads.
        """
        pairs = [self._cache.get(p, lambda p=p: (self._words(p, device), self.pool(p, device))) for p in prompts]
        return [words for words, _ in pairs], torch.stack([pooled for _, pooled in pairs])

    def _words(self, prompt: str, device: torch.device) -> Tensor:
        """[n, D]"""
        ids = resolve(self._tokenizer)(spec.TEMPLATE.format(prompt), return_tensors="pt").input_ids
        check_length(ids.shape[1] - spec.TEMPLATE_TOKENS, spec.TEXT_LENGTH)
        return self.hidden_state(ids.to(device), spec.HIDDEN_STATE)[spec.TEMPLATE_TOKENS :]

    def pool(self, prompt: str, device: torch.device) -> Tensor:
        """[P]; CLIP reads the first `CLIP_LENGTH` tokens, the rest of a long prompt reaches the language model only."""
        ids = resolve(self._tokenizer_2)(
            prompt, padding="max_length", max_length=spec.CLIP_LENGTH, truncation=True, return_tensors="pt"
        ).input_ids
        return resolve(self._text_encoder_2)(ids.to(device)).pooler_output[0]


class HunyuanImageTextStage(HunyuanTextEncodingStage):
    """The same for a language model that sees the image: its image tokens come before those of the prompt.

    It sees the image at the size of the video; unconditional rows see a black one.

    Args:
        tokenizer, text_encoder: of a Llava-like model, or lazy.
        tokenizer_2, text_encoder_2: of CLIP, or lazy.
        image_processor: of the language model, or lazy.
        stride: every which image token is kept.
    """

    def __init__(
        self,
        tokenizer: Any | Lazy[Any],
        text_encoder: nn.Module | Lazy[nn.Module],
        tokenizer_2: Any | Lazy[Any],
        text_encoder_2: nn.Module | Lazy[nn.Module],
        image_processor: Any | Lazy[Any],
        stride: int,
    ) -> None:
        super().__init__(tokenizer, text_encoder, tokenizer_2, text_encoder_2)
        self._image_processor = image_processor
        self.stride = stride

    @torch.no_grad()
    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The batch with text of both branches padded to one length."""
        if batch.image is None:
            raise InputError("this model makes videos from an image; give image=")
        length = spec.TEXT_LENGTH + spec.IMAGE_TOKENS // min(self.stride, spec.NEGATIVE_IMAGE_STRIDE)
        words, pooled = self._encode_all(batch.prompts, batch.image, self.stride, args.device)
        batch.prompt_embeds, batch.prompt_lengths = pad_rows(words, length)
        batch.family = HunyuanInputs(pooled)
        if true_cfg_scale(batch) != 1.0:
            black = torch.full_like(batch.image, -1.0)
            words, batch.family.negative_pooled = self._encode_all(
                batch.negative_prompts, black, spec.NEGATIVE_IMAGE_STRIDE, args.device
            )
            batch.negative_embeds, batch.negative_lengths = pad_rows(words, length)
        return batch

    def _encode_all(
        self, prompts: Sequence[str], images: Tensor, stride: int, device: torch.device
    ) -> tuple[list[Tensor], Tensor]:
        words = [self._see(prompt, image, stride, device) for prompt, image in zip(prompts, images, strict=True)]
        return words, torch.stack([self.pool(prompt, device) for prompt in prompts])

    def _see(self, prompt: str, image: Tensor, stride: int, device: torch.device) -> Tensor:
        """[n, D] image tokens, then those of the prompt, of one image [3, H, W] in [-1, 1]."""
        tokenizer, encoder = resolve(self._tokenizer), resolve(self._text_encoder)
        config: Any = encoder.config
        ids = tokenizer(spec.IMAGE_TEMPLATE.format(prompt), return_tensors="pt").input_ids[0]
        check_length(len(ids) - spec.IMAGE_TEMPLATE_TOKENS, spec.TEXT_LENGTH)
        places = (ids == config.image_token_index).nonzero()
        if len(places) != 1:
            raise InputError(f"prompt={prompt!r} holds the mark that stands for the image in the model's template")
        start = int(places[0])
        grown = torch.cat([ids[:start], ids[start].repeat(spec.IMAGE_TOKENS), ids[start + 1 :]]).unsqueeze(0).to(device)
        pixels = resolve(self._image_processor)(to_picture(image), return_tensors="pt").pixel_values
        states = self.hidden_state(grown, spec.HIDDEN_STATE, pixel_values=pixels.to(next(encoder.parameters())))
        more = spec.IMAGE_TOKENS - 1  # tokens after the image stand that much further on
        header = int((ids == tokenizer.convert_tokens_to_ids(spec.HEADER_END)).nonzero()[-1]) + 1
        prompt_states = states[spec.IMAGE_TEMPLATE_TOKENS + more : header + more - spec.ANSWER_HEADER]
        image_states = states[start : start + spec.IMAGE_TOKENS : stride]
        return torch.cat([image_states, prompt_states, states[header + more :]])


class HunyuanImageLatentStage(Stage):
    """Fills `condition` from the image, and mixes a little of it into the start.

    Args:
        vae: encodes the image, or lazy.
        kind: the transformer's `image_condition_type`.
    """

    def __init__(self, vae: Any | Lazy[Any], kind: str) -> None:
        self._vae = vae
        self.kind = kind

    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The batch with `condition`: the image's latents [B, C, 1, h, w], or latents and mask [B, C + 1, T, h, w]."""
        assert batch.image is not None and batch.latents is not None
        z = encode_images(resolve(self._vae), batch.image)  # [B, C, 1, h, w]
        share = torch.tensor(spec.NOISE_SHARE)
        batch.latents = batch.latents * share + z * (1 - share)
        batch.condition = z
        if self.kind == "latent_concat":
            batch.condition = first_frame_condition(z, batch.latents.shape[2])
        return batch
