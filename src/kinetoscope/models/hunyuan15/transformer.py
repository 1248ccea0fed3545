"""The HunyuanVideo 1.5 transformer (arXiv 2511.18870), parameter names as in the published diffusers checkpoints.

R rows, N video tokens, L tokens of text and image, d width, H heads of D channels. Three sources meet the video: a
language model (refined), a glyph encoder that reads quoted text, and an image encoder. The published code puts valid
tokens before padding; nothing in the attention depends on their order, so here what is hidden is left out or masked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kinetoscope.attention import attention
from kinetoscope.core.errors import InputError
from kinetoscope.models.hunyuan15.config import HunyuanVideo15Config
from kinetoscope.nn.dual_stream import (
    FREQ_DIM,
    DualStreamBlock,
    MaskedText,
    ModulatedOutput,
    PatchEmbedding,
    TokenRefiner,
    join_biases,
    trim_text,
)
from kinetoscope.nn.embeddings import TimestepEmbedding, sinusoidal_embedding
from kinetoscope.nn.linear import Linear
from kinetoscope.nn.norm import FP32LayerNorm
from kinetoscope.nn.rope import rope_table
from kinetoscope.nn.split import TokenAxes
from kinetoscope.nn.stack import BlockCall, run_blocks

GLYPH_HIDDEN = 2048
WORDS, GLYPHS, IMAGE = range(3)  # rows of the table of token kinds
TOKENS = TokenAxes(each={"rope": 0})


class Hunyuan15Text(NamedTuple):
    """What depends on the prompt and the image alone; rows first."""

    words: MaskedText  # the language model's tokens, for the refiner
    others: Tensor  # [R, E, d] embedded tokens of the image and the glyphs
    others_bias: Tensor | None  # [R, E] float32, minus infinity for tokens a row does not have


class Hunyuan15Time(NamedTuple):
    """What depends on the timestep alone."""

    refiner: Tensor  # [R or 1, d]
    vector: Tensor  # [R or 1, d]


class GlyphProjection(nn.Module):
    """Tokens of the glyph encoder to tokens of the transformer."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.norm = FP32LayerNorm(in_dim)
        self.linear_1 = Linear(in_dim, GLYPH_HIDDEN)
        self.linear_2 = Linear(GLYPH_HIDDEN, GLYPH_HIDDEN)
        self.linear_3 = Linear(GLYPH_HIDDEN, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[R, G, in_dim] -> [R, G, d]"""
        return self.linear_3(F.gelu(self.linear_2(F.gelu(self.linear_1(self.norm(x))))))


class ImageProjection(nn.Module):
    """Tokens of the image encoder to tokens of the transformer."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.norm_in = FP32LayerNorm(in_dim)
        self.linear_1 = Linear(in_dim, in_dim)
        self.linear_2 = Linear(in_dim, dim)
        self.norm_out = FP32LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """[R, I, in_dim] -> [R, I, d]"""
        return self.norm_out(self.linear_2(F.gelu(self.linear_1(self.norm_in(x)))))


class TimeEmbedding(nn.Module):
    """Embedding of the timestep, and of the next one where the model takes it (MeanFlow, arXiv 2505.13447)."""

    def __init__(self, dim: int, use_meanflow: bool) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(FREQ_DIM, dim)
        self.timestep_embedder_r = TimestepEmbedding(FREQ_DIM, dim) if use_meanflow else None

    def forward(self, timestep: Tensor, timestep_r: Tensor | None) -> Tensor:
        """[R], [R] -> [R, d]"""
        emb = self.timestep_embedder(sinusoidal_embedding(timestep, FREQ_DIM))
        if self.timestep_embedder_r is None or timestep_r is None:
            return emb
        return emb + self.timestep_embedder_r(sinusoidal_embedding(timestep_r, FREQ_DIM))


class HunyuanVideo15Transformer3DModel(nn.Module):
    """HunyuanVideo 1.5 transformer, text-to-video and image-to-video.

    Built on the meta device it has exactly the names and shapes of a published checkpoint.

    Args:
        config: published sizes.
    """

    keep_in_float32 = ()

    def __init__(self, config: HunyuanVideo15Config) -> None:
        super().__init__()
        config.check()
        self.config = config
        dim, head_dim = config.dim, config.attention_head_dim
        self.x_embedder = PatchEmbedding(config.in_channels, dim, config.patch)
        self.image_embedder = ImageProjection(config.image_embed_dim, dim)
        self.context_embedder = TokenRefiner(config.text_embed_dim, dim, head_dim, config.num_refiner_layers, attention)
        self.context_embedder_2 = GlyphProjection(config.text_embed_2_dim, dim)
        self.time_embed = TimeEmbedding(dim, config.use_meanflow)
        self.cond_type_embed = nn.Embedding(3, dim)
        self.transformer_blocks = nn.ModuleList(
            DualStreamBlock(dim, head_dim, config.mlp_ratio, attention) for _ in range(config.num_layers)
        )
        self.norm_out = ModulatedOutput(dim)
        self.proj_out = Linear(dim, (config.out_channels or config.in_channels) * math.prod(config.patch))

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks in order, for what treats blocks alike (compilation)."""
        return [*self.transformer_blocks]

    def prepare_conditioning(
        self,
        *,
        encoder_hidden_states: Tensor,
        text_lengths: Tensor | None = None,
        encoder_hidden_states_2: Tensor | None = None,
        text_lengths_2: Tensor | None = None,
        image_embeds: Tensor | None = None,
    ) -> dict[str, Hunyuan15Text]:
        """What the prompt and the image set, once a run. Tokens beyond true lengths are masked for real.

        Args:
            encoder_hidden_states: [R, L, text_embed_dim] hidden states of the language model.
            text_lengths: [R] true lengths; None: all L tokens count.
            encoder_hidden_states_2: [R, G, text_embed_2_dim] of the glyph encoder; None: no row has quoted text.
            text_lengths_2: [R] true lengths, 0 for a row without quoted text; None: all G tokens count.
            image_embeds: [R, I, image_embed_dim] of the image encoder; None for text-to-video.

        Raises:
            InputError: a length is out of range.
        """
        kinds, dtype = self.cond_type_embed.weight, self.proj_out.weight.dtype
        words = self.context_embedder.prepare(encoder_hidden_states, text_lengths)
        tokens: list[Tensor] = []
        biases: list[Tensor | None] = []
        if image_embeds is not None:
            tokens.append(self.image_embedder(image_embeds.to(dtype)) + kinds[IMAGE])
            biases.append(None)
        if encoder_hidden_states_2 is not None:
            glyphs, bias = trim_text(encoder_hidden_states_2.to(dtype), text_lengths_2, shortest=0)
            tokens.append(self.context_embedder_2(glyphs) + kinds[GLYPHS])
            biases.append(bias)
        none = words.tokens.new_zeros(len(words.tokens), 0, words.tokens.shape[-1])
        others = torch.cat([none, *tokens], dim=1)  # [R, E, d]
        others_bias = join_biases(biases, [t.shape[1] for t in tokens])
        return {"text": Hunyuan15Text(words, others, others_bias)}

    def prepare_timesteps(self, timesteps: Tensor) -> dict[str, Hunyuan15Time]:
        """Embeddings of each of S timesteps, once a run, each computed alone: [S] -> leading dimension S.

        With `use_meanflow` each goes with the next one, the last with 0.
        """
        following = torch.cat([timesteps[1:], timesteps.new_zeros(1)])
        steps = [self._time(t.view(1), r.view(1)) for t, r in zip(timesteps, following, strict=True)]
        return {"time": Hunyuan15Time(torch.cat([s.refiner for s in steps]), torch.cat([s.vector for s in steps]))}

    def prepare_shared(self, latent_shape: Sequence[int]) -> dict[str, Tensor]:
        """Rotary table of a latent shape [..., T, H, W], once a run.

        Raises:
            InputError: a size is not a multiple of the patch.
        """
        return {"rope": self._rope(latent_shape)}

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *,
        timestep_r: Tensor | None = None,
        text_lengths: Tensor | None = None,
        encoder_hidden_states_2: Tensor | None = None,
        text_lengths_2: Tensor | None = None,
        image_embeds: Tensor | None = None,
        text: Hunyuan15Text | None = None,
        time: Hunyuan15Time | None = None,
        rope: Tensor | None = None,
    ) -> Tensor:
        """Predicted flow velocity.

        Args:
            latents: [R, in_channels, T, H, W]: the sample, the condition latents and the mask of given frames.
            timestep: [R] in [0, 1000].
            timestep_r: [R] the timestep to step to, for models with `use_meanflow`.
            encoder_hidden_states, text_lengths, encoder_hidden_states_2, text_lengths_2, image_embeds: see
                `prepare_conditioning`; needed unless `text` is given.
            text, time, rope: what the `prepare_*` methods return, to spare computing them again.

        Returns:
            [R, out_channels, T, H, W] in the dtype of `latents`.
        """
        if text is None:
            if encoder_hidden_states is None:
                raise InputError("the HunyuanVideo 1.5 transformer needs encoder_hidden_states or prepared text")
            text = self.prepare_conditioning(
                encoder_hidden_states=encoder_hidden_states,
                text_lengths=text_lengths,
                encoder_hidden_states_2=encoder_hidden_states_2,
                text_lengths_2=text_lengths_2,
                image_embeds=image_embeds,
            )["text"]
        if time is None:
            time = self._time(timestep, timestep_r)
        if rope is None:
            rope = self._rope(latents.shape)

        words = self.context_embedder(text.words, time.refiner) + self.cond_type_embed.weight[WORDS]  # [R, L', d]
        x, grid = self.x_embedder(latents)  # [R, N, d]
        counts = [x.shape[1], text.others.shape[1], words.shape[1]]
        key_bias = join_biases([None, text.others_bias, text.words.key_bias], counts)  # [R, N + L]
        context = torch.cat([text.others, words], dim=1)  # [R, L, d]
        emb = F.silu(time.vector).unsqueeze(1)  # [R or 1, 1, d]
        rows = {"emb": emb, "key_bias": key_bias}
        shared = {"rope": rope, "grid": tuple(grid)}
        calls = [BlockCall(block, rows, shared, TOKENS) for block in self.transformer_blocks]
        x, _ = run_blocks((x, context), calls)
        return self.x_embedder.undo(self.proj_out(self.norm_out(x, emb)), grid).to(latents.dtype)

    def _time(self, timestep: Tensor, timestep_r: Tensor | None) -> Hunyuan15Time:
        """[R] -> embeddings [R, d]"""
        return Hunyuan15Time(
            self.context_embedder.time_text_embed.embed_time(timestep), self.time_embed(timestep, timestep_r)
        )

    def _rope(self, latent_shape: Sequence[int]) -> Tensor:
        """[..., T, H, W] -> complex64 [N, D/2]"""
        positions = self.x_embedder.positions(latent_shape)
        return rope_table(positions, self.config.rope_axes_dim, self.config.rope_theta)
