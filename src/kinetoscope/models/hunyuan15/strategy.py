"""What HunyuanVideo 1.5 does differently in a run: a second text, and channels for a condition that may be empty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kinetoscope.core.types import ExecutionArgs, ForwardBatch
from kinetoscope.diffusion.guidance import COND
from kinetoscope.engine.protocols import StrategyState, Tree
from kinetoscope.engine.strategies.standard import StandardStrategy, stack_text


@dataclass(slots=True)
class Hunyuan15Inputs:
    """What a HunyuanVideo 1.5 run needs beyond the common fields of a batch.

    Attributes:
        glyphs: [B, G, D] quoted text of the prompts, encoded letter by letter.
        glyph_lengths: [B] true lengths (int64, CPU), 0 for a prompt that quotes nothing.
        negative_glyphs, negative_glyph_lengths: the same for the negative prompts; None when guidance is off.
    """

    glyphs: Tensor
    glyph_lengths: Tensor
    negative_glyphs: Tensor | None = None
    negative_glyph_lengths: Tensor | None = None


class Hunyuan15Strategy(StandardStrategy):
    """Standard steps. The network sees the sample, `batch.condition` [B, C + 1, T, h, w] (latents of given frames and
    their mask; nothing given is zeros), and three kinds of tokens."""

    def prepare_conditioning(
        self, batch: ForwardBatch, args: ExecutionArgs, branches: tuple[str, ...]
    ) -> dict[str, Tree]:
        """Both texts with their true lengths, and the image's features for every branch alike."""
        given = batch.family
        assert isinstance(given, Hunyuan15Inputs)
        embeds, lengths = stack_text(batch, branches)
        glyphs = [given.glyphs if b == COND else given.negative_glyphs for b in branches]
        counts = [given.glyph_lengths if b == COND else given.negative_glyph_lengths for b in branches]
        image = batch.image_embeds
        transformer: Any = self.parts.transformer
        return transformer.prepare_conditioning(
            encoder_hidden_states=embeds.to(args.device, args.dtype),
            text_lengths=lengths,
            encoder_hidden_states_2=torch.cat([g for g in glyphs if g is not None]).to(args.device, args.dtype),
            text_lengths_2=torch.cat([c for c in counts if c is not None]),
            image_embeds=None if image is None else image.to(args.device, args.dtype).repeat(len(branches), 1, 1),
        )

    def model_latents(self, state: StrategyState) -> Tensor:
        """[B, 2 C + 1, T, h, w]"""
        if state.batch.condition is not None:
            return super().model_latents(state)
        b, c, *grid = state.latents.shape
        return torch.cat([state.latents, state.latents.new_zeros(b, c + 1, *grid)], dim=1)
