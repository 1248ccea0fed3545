"""Prompts to embeddings, by the recipe T5-conditioned video models were trained with (Wan, Cosmos).

Clean the text, tokenize, encode under the attention mask, keep the true length, fill with zeros to the fixed length.
The encoder runs on the true tokens alone: padded positions are masked out of its attention, so they change nothing,
and a 20-token prompt costs 20 tokens instead of 512 (`docs/decisions/text-encoding.md`).
"""

from __future__ import annotations

import html
import re
from typing import Any

import ftfy
import torch
from torch import Tensor, nn

from kinetoscope.core.errors import InputError
from kinetoscope.core.types import ExecutionArgs, ForwardBatch
from kinetoscope.pipelines.lazy import Lazy, resolve
from kinetoscope.pipelines.stages.base import Stage
from kinetoscope.pipelines.stages.prompt_cache import PromptCache


def clean_prompt(text: str) -> str:
    """`text` with broken unicode mended, HTML entities resolved and white space folded, as Wan was trained."""
    text = ftfy.fix_text(text)
    text = html.unescape(html.unescape(text)).strip()
    return re.sub(r"\s+", " ", text).strip()


class TextEncodingStage(Stage):
    """Fills `prompt_embeds`, `prompt_lengths` and, where guidance needs them, the negative ones.

    Args:
        tokenizer: of `transformers`, or lazy.
        text_encoder: a T5-like encoder whose output has `last_hidden_state`, or lazy.
        max_length: tokens the transformer was trained with; also the longest prompt.
    """

    def __init__(self, tokenizer: Any | Lazy[Any], text_encoder: nn.Module | Lazy[nn.Module], max_length: int) -> None:
        self._tokenizer = tokenizer
        self._text_encoder = text_encoder
        self.max_length = max_length
        self._cache = PromptCache[Tensor]()

    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """Encode each distinct prompt once; the prompts used last stay for later batches."""
        batch.prompt_embeds, batch.prompt_lengths = self.encode(batch.prompts, args.device)
        if batch.params.guided:
            batch.negative_embeds, batch.negative_lengths = self.encode(batch.negative_prompts, args.device)
        return batch

    def encode(self, prompts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Embeddings [B, max_length, D], zero beyond the true lengths [B] (int64, CPU).

        Raises:
            InputError: a prompt is longer than `max_length` tokens.
        """
        cleaned = [clean_prompt(p) for p in prompts]
        encoded = [self._cache.get(p, lambda p=p: self._encode_one(p, device)) for p in cleaned]
        padded = [nn.functional.pad(e, (0, 0, 0, self.max_length - len(e))) for e in encoded]
        return torch.stack(padded), torch.tensor([len(e) for e in encoded])

    def _encode_one(self, prompt: str, device: torch.device) -> Tensor:
        ids = resolve(self._tokenizer)(prompt, add_special_tokens=True, return_tensors="pt").input_ids
        length = ids.shape[1]
        if length > self.max_length:
            raise InputError(
                f"the prompt has {length} tokens and the model reads at most {self.max_length}; shorten it"
            )
        ids = ids.to(device)
        with torch.no_grad():
            return resolve(self._text_encoder)(ids, torch.ones_like(ids)).last_hidden_state[0]  # [n, D]
