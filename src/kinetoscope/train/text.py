"""Training a small UMT5 text encoder on the sentences of a world."""

from __future__ import annotations

import string
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from kinetoscope.train.loop import step_generator
from kinetoscope.train.recipe import TextSection
from kinetoscope.worlds import World, get_world

MAX_LENGTH = 512
WORDINGS = 40
"""Random wordings of each sentence from which the vocabulary is collected."""


def build_tokenizer(world: World[Any]) -> T5Tokenizer:
    """A unigram tokenizer with the world's words as whole pieces, and characters for all other text.

    It is built as data, since training a tokenizer is not deterministic.
    """
    rng = np.random.default_rng(0)
    words = {w for spec in world.captions() for _ in range(WORDINGS) for w in _words(spec.caption(rng))}
    pieces = ["<pad>", "</s>", "<unk>", "▁", *("▁" + w for w in sorted(words))]
    pieces += [c for c in string.printable if not c.isspace()]
    known = set(pieces)
    pieces += [p for c in string.printable if not c.isspace() and (p := "▁" + c) not in known]
    scores = [0.0, 0.0, 0.0, -10.0] + [-1.0 if len(p) > 2 else -8.0 for p in pieces[4:]]
    return T5Tokenizer(vocab=list(zip(pieces, scores, strict=True)), extra_ids=0, model_max_length=MAX_LENGTH)


def _words(sentence: str) -> list[str]:
    return sentence.replace(",", " ").replace(".", " ").split()


class TextModel(nn.Module):
    """The encoder with the heads that teach it: one guesses hidden tokens, one reads each attribute of the world."""

    def __init__(self, config: UMT5Config, attributes: dict[str, tuple[str, ...]]) -> None:
        super().__init__()
        self.encoder = UMT5EncoderModel(config)
        self.tokens = nn.Linear(config.d_model, config.vocab_size)
        self.attributes = nn.ModuleDict({k: nn.Linear(config.d_model, len(v)) for k, v in attributes.items()})


class TextTask:
    """Guess hidden words, and read the attributes from the mean of the token states."""

    name = "text"

    def __init__(self, section: TextSection, world_name: str, seed: int) -> None:
        self.section = section
        self.world = get_world(world_name)
        self.tokenizer = build_tokenizer(self.world)
        config = UMT5Config(vocab_size=len(self.tokenizer), dropout_rate=0.0, **section.config)
        self.module = TextModel(config, self.world.attributes)
        _initialise(self.module, step_generator(seed, 0))
        self.specs = self.world.captions()

    def losses(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Cross-entropies of the hidden tokens and of the attributes."""
        rng = np.random.default_rng(int(torch.randint(0, 2**31, (1,), generator=generator)))
        specs = [self.specs[int(i)] for i in rng.integers(len(self.specs), size=self.section.batch)]
        tokens = self.tokenizer([s.caption(rng) for s in specs], padding=True, return_tensors="pt")
        ids, mask = tokens.input_ids, tokens.attention_mask
        hidden = (torch.rand(ids.shape, generator=generator) < self.section.mask) & mask.bool()
        hidden[:, 0] |= ~hidden.any(1)
        unknown = self.tokenizer.unk_token_id
        states = self.module.encoder(ids.masked_fill(hidden, unknown), mask).last_hidden_state  # [B, L, d]
        guess = nn.functional.cross_entropy(self.module.tokens(states[hidden]), ids[hidden])
        clear = self.module.encoder(ids, mask).last_hidden_state
        mean = (clear * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)  # [B, d]
        read = torch.stack(
            [
                nn.functional.cross_entropy(self.module.attributes[name](mean), self._labels(name, values, specs))
                for name, values in self.world.attributes.items()
            ]
        ).mean()
        return {"total": guess + read, "hidden_tokens": guess, "attributes": read}

    @staticmethod
    def _labels(name: str, values: tuple[str, ...], specs: list[Any]) -> Tensor:
        return torch.tensor([values.index(s.attributes()[name]) for s in specs])


def _initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Draw every matrix from `generator` and clear biases, so that the start depends on the recipe's seed alone."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                std = parameter.shape[-1] ** -0.5
                parameter.copy_(torch.empty_like(parameter).normal_(0.0, std, generator=generator))
            elif name.endswith("bias"):
                parameter.zero_()


@torch.no_grad()
def encode_text(tokenizer: Any, encoder: nn.Module, sentences: list[str]) -> tuple[Tensor, Tensor]:
    """Token states [B, L, d] float32, zero beyond the true lengths [B], padded to the longest sentence only."""
    tokens = tokenizer(sentences, padding=True, return_tensors="pt")
    states = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state.float()
    return states * tokens.attention_mask[..., None], tokens.attention_mask.sum(1)
