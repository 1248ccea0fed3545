"""Stages of HunyuanVideo: a language model reads the prompt inside a template, CLIP gives one vector."""

from __future__ import annotations

from collections import OrderedDict
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
from kinetoscope.pipelines.stages.text import CACHE_SIZE
from kinetoscope.pipelines.stages.validation import MAX_GUIDANCE, InputValidationStage


class HunyuanValidationStage(InputValidationStage):
    """Checks the whole request."""

    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The same batch, or an `InputError`."""
        value = (batch.params.extra or {}).get("true_cfg_scale", 1.0)
        if type(value) not in (int, float) or not 1.0 <= value <= MAX_GUIDANCE:
            raise InputError(
                f"true_cfg_scale={value!r} must be a number in [1, {MAX_GUIDANCE:g}]; 1 switches it off "
                "(guidance_scale is embedded in the network)"
            )
        return super().forward(batch, args)


class HunyuanTextEncodingStage(Stage):
    """Fills text embeddings and true lengths, and `family` with the pooled text.

    Args:
        tokenizer, text_encoder: of a Llama-like language model, or lazy.
        tokenizer_2, text_encoder_2: of CLIP, or lazy.
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
        self._cache: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()

    @torch.no_grad()
    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """Encode each distinct prompt once; the last `CACHE_SIZE` stay for later batches."""
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
        pairs = [self._encode_one(prompt, device) for prompt in prompts]
        return [words for words, _ in pairs], torch.stack([pooled for _, pooled in pairs])

    def _encode_one(self, prompt: str, device: torch.device) -> tuple[Tensor, Tensor]:
        if prompt in self._cache:
            self._cache.move_to_end(prompt)
            return self._cache[prompt]
        self._cache[prompt] = made = (self._words(prompt, device), self.pool(prompt, device))
        if len(self._cache) > CACHE_SIZE:
            self._cache.popitem(last=False)
        return made

    def _words(self, prompt: str, device: torch.device) -> Tensor:
        """[n, D]; the language model is causal, so padding behind the prompt would change nothing and is left out."""
        ids = resolve(self._tokenizer)(spec.TEMPLATE.format(prompt), return_tensors="pt").input_ids
        check_length(ids.shape[1] - spec.TEMPLATE_TOKENS)
        ids = ids.to(device)
        states = resolve(self._text_encoder)(
            input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True
        ).hidden_states
        return states[spec.HIDDEN_STATE][0, spec.TEMPLATE_TOKENS :]

    def pool(self, prompt: str, device: torch.device) -> Tensor:
        """[P]; CLIP reads the first `CLIP_LENGTH` tokens, the rest of a long prompt reaches the language model only."""
        ids = resolve(self._tokenizer_2)(
            prompt, padding="max_length", max_length=spec.CLIP_LENGTH, truncation=True, return_tensors="pt"
        ).input_ids
        return resolve(self._text_encoder_2)(ids.to(device)).pooler_output[0]


def check_length(count: int) -> None:
    """Refuse a prompt of more tokens than the model reads.

    Raises:
        InputError: it has more.
    """
    if count > spec.TEXT_LENGTH:
        raise InputError(f"the prompt has {count} tokens and the model reads at most {spec.TEXT_LENGTH}; shorten it")


def pad_rows(rows: Sequence[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Texts [n, D] as one [B, length, D], zero beyond the true lengths [B] (int64, CPU)."""
    padded = [nn.functional.pad(row, (0, 0, 0, length - len(row))) for row in rows]
    return torch.stack(padded), torch.tensor([len(row) for row in rows])
