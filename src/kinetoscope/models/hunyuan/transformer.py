"""The HunyuanVideo transformer (arXiv 2412.03603), parameter names as in the published diffusers checkpoints.

R rows, N video tokens, L text tokens, d width, H heads of D channels. Modulation has G groups: one, or two where the
first frame is an image (`image_condition_type="token_replace"`): the first group is its own, at timestep 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kinetoscope.attention import attention
from kinetoscope.core.errors import InputError
from kinetoscope.models.hunyuan.config import HunyuanVideoConfig
from kinetoscope.nn.dual_stream import (
    EPS,
    FREQ_DIM,
    DualStreamBlock,
    MaskedText,
    ModulatedOutput,
    ModulationLayer,
    PatchEmbedding,
    TimeTextEmbedding,
    TokenRefiner,
    gated_add,
    join_biases,
    modulate,
)
from kinetoscope.nn.embeddings import TimestepEmbedding, sinusoidal_embedding
from kinetoscope.nn.linear import Linear, linear_gelu
from kinetoscope.nn.norm import ModulatedNorm, RMSNorm
from kinetoscope.nn.rope import apply_rope, rope_table
from kinetoscope.nn.split import TokenAxes
from kinetoscope.nn.stack import BlockCall, join_tokens, run_blocks


class HunyuanText(NamedTuple):
    """What depends on the prompt alone; rows first."""

    words: MaskedText  # the language model's tokens, for the refiner
    pooled: Tensor  # [R, d] embedding of the pooled vector
    guidance: Tensor | None  # [R, d] embedding of the guidance scale


class HunyuanTime(NamedTuple):
    """What depends on the timestep alone."""

    refiner: Tensor  # [R or 1, d]
    vector: Tensor  # [R or 1, d]
    clean: Tensor | None  # [R or 1, d], of timestep 0, for the first frame of an image


class SingleAttention(nn.Module):
    """Attention over the joined sequence; its output projection is the block's."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.to_q = Linear(dim, dim)
        self.to_k = Linear(dim, dim)
        self.to_v = Linear(dim, dim)
        self.norm_q = RMSNorm(head_dim, EPS)
        self.norm_k = RMSNorm(head_dim, EPS)

    def forward(
        self, x: Tensor, rope: Tensor, key_bias: Tensor | None, grid: tuple[int, int, int] | None = None
    ) -> Tensor:
        """[R, N + L, d], rope [N + L, D/2] -> [R, N + L, d]"""
        heads = (-1, self.head_dim)
        q = apply_rope(self.norm_q(self.to_q(x).unflatten(-1, heads)), rope)  # [R, N + L, H, D]
        k = apply_rope(self.norm_k(self.to_k(x).unflatten(-1, heads)), rope)
        v = self.to_v(x).unflatten(-1, heads)
        return attention(q, k, v, role="joint", key_bias=key_bias, grid=grid).flatten(2)


class HunyuanVideoSingleTransformerBlock(nn.Module):
    """Attention and feed-forward side by side over video and text joined, one gated residual."""

    joins_text = True  # so the number of its tokens changes with the prompt

    def __init__(self, config: HunyuanVideoConfig) -> None:
        super().__init__()
        dim, hidden = config.dim, int(config.dim * config.mlp_ratio)
        self.modulated = ModulatedNorm(dim, EPS)
        self.norm = ModulationLayer(dim, 3)
        self.attn = SingleAttention(dim, config.attention_head_dim)
        self.proj_mlp = Linear(dim, hidden)
        self.proj_out = Linear(dim + hidden, dim)

    def forward(
        self,
        x: Tensor,
        emb: Tensor,
        rope: Tensor,
        key_bias: Tensor | None,
        first: int,
        grid: tuple[int, int, int] | None = None,
    ) -> Tensor:
        """x [R, N + L, d], emb [R, G, d] (after SiLU), rope [N + L, D/2] -> like x"""
        shift, scale, gate = self.norm(emb)  # [R, G, d] each
        y = modulate(self.modulated, x, shift, scale, first)
        y = torch.cat([self.attn(y, rope, key_bias, grid), linear_gelu(self.proj_mlp, y)], dim=-1)
        return gated_add(x, self.proj_out(y), gate, first)


class ConditionEmbedding(TimeTextEmbedding):
    """Embeddings of timestep, pooled text and guidance scale."""

    def __init__(self, config: HunyuanVideoConfig) -> None:
        super().__init__(config.dim, config.pooled_projection_dim)
        self.guidance_embedder = TimestepEmbedding(FREQ_DIM, config.dim) if config.guidance_embeds else None


class HunyuanVideoTransformer3DModel(nn.Module):
    """HunyuanVideo transformer, text-to-video and both kinds of image-to-video.

    Built on the meta device it has exactly the names and shapes of a published checkpoint.

    Args:
        config: published sizes.
    """

    keep_in_float32 = ()

    def __init__(self, config: HunyuanVideoConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        dim, head_dim = config.dim, config.attention_head_dim
        self.x_embedder = PatchEmbedding(config.in_channels, dim, config.patch)
        self.context_embedder = TokenRefiner(config.text_embed_dim, dim, head_dim, config.num_refiner_layers, attention)
        self.time_text_embed = ConditionEmbedding(config)
        self.transformer_blocks = nn.ModuleList(
            DualStreamBlock(dim, head_dim, config.mlp_ratio, attention) for _ in range(config.num_layers)
        )
        self.single_transformer_blocks = nn.ModuleList(
            HunyuanVideoSingleTransformerBlock(config) for _ in range(config.num_single_layers)
        )
        self.norm_out = ModulatedOutput(dim)
        self.proj_out = Linear(dim, (config.out_channels or config.in_channels) * math.prod(config.patch))

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks in order, for what treats blocks alike (compilation)."""
        return [*self.transformer_blocks, *self.single_transformer_blocks]

    def prepare_conditioning(
        self,
        *,
        encoder_hidden_states: Tensor,
        text_lengths: Tensor | None = None,
        pooled_projections: Tensor,
        guidance: Tensor | None = None,
    ) -> dict[str, HunyuanText]:
        """What the prompt and the guidance scale set, once a run. Text beyond its true length is masked for real.

        Args:
            encoder_hidden_states: [R, L, text_embed_dim] hidden states of the language model.
            text_lengths: [R] true lengths; None: all L tokens count.
            pooled_projections: [R, pooled_projection_dim] pooled CLIP text.
            guidance: [R] embedded guidance scale times 1000; needed exactly where the model embeds it.

        Raises:
            InputError: a length is not in [1, L], or guidance is missing.
        """
        embed = self.time_text_embed
        emb = None
        if embed.guidance_embedder is not None:
            if guidance is None:
                raise InputError("this HunyuanVideo transformer embeds the guidance scale: give `guidance`")
            emb = embed.guidance_embedder(sinusoidal_embedding(guidance, FREQ_DIM))
        words = self.context_embedder.prepare(encoder_hidden_states, text_lengths)
        return {"text": HunyuanText(words, embed.text_embedder(pooled_projections), emb)}

    def prepare_timesteps(self, timesteps: Tensor) -> dict[str, HunyuanTime]:
        """Embeddings of each of S timesteps, once a run, each computed alone: [S] -> leading dimension S."""
        steps = [self._time(t.view(1)) for t in timesteps]
        clean = [s.clean for s in steps if s.clean is not None]
        return {
            "time": HunyuanTime(
                torch.cat([s.refiner for s in steps]),
                torch.cat([s.vector for s in steps]),
                torch.cat(clean) if clean else None,
            )
        }

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
        text_lengths: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        guidance: Tensor | None = None,
        text: HunyuanText | None = None,
        time: HunyuanTime | None = None,
        rope: Tensor | None = None,
    ) -> Tensor:
        """Predicted flow velocity.

        Args:
            latents: [R, in_channels, T, H, W]; with "token_replace" the first frame is the image's.
            timestep: [R] in [0, 1000].
            encoder_hidden_states, text_lengths, pooled_projections, guidance: see `prepare_conditioning`; needed
                unless `text` is given.
            text, time, rope: what the `prepare_*` methods return, to spare computing them again.

        Returns:
            [R, out_channels, T, H, W] in the dtype of `latents`.
        """
        if text is None:
            if encoder_hidden_states is None or pooled_projections is None:
                raise InputError("the HunyuanVideo transformer needs text and pooled text, or prepared text")
            text = self.prepare_conditioning(
                encoder_hidden_states=encoder_hidden_states,
                text_lengths=text_lengths,
                pooled_projections=pooled_projections,
                guidance=guidance,
            )["text"]
        if time is None:
            time = self._time(timestep)
        if rope is None:
            rope = self._rope(latents.shape)

        words = self.context_embedder(text.words, time.refiner)  # [R, L, d]
        emb = self._embedding(text, time)  # [R, G, d]
        x, grid = self.x_embedder(latents)  # [R, N, d]
        first = grid[1] * grid[2]
        key_bias = join_biases([None, text.words.key_bias], [x.shape[1], words.shape[1]])  # [R, N + L]
        unrotated = torch.ones(words.shape[1], rope.shape[1], dtype=rope.dtype, device=rope.device)
        table = torch.cat([rope, unrotated])  # [N + L, D/2]
        rows = {"emb": emb, "key_bias": key_bias}
        shared = {"first": first, "grid": tuple(grid)}
        apart = TokenAxes(each={"rope": 0}, leading=("first",))
        joint = replace(apart, tail=words.shape[1])
        joined = run_blocks((x, words), [  # [R, N + L, d]
            *(BlockCall(block, rows, {"rope": rope, **shared}, apart) for block in self.transformer_blocks),
            BlockCall(join_tokens),
            *(BlockCall(block, rows, {"rope": table, **shared}, joint) for block in self.single_transformer_blocks),
        ])  # fmt: skip
        x = self.norm_out(joined[:, : x.shape[1]], emb[:, -1:])
        return self.x_embedder.undo(self.proj_out(x), grid).to(latents.dtype)

    def _time(self, timestep: Tensor) -> HunyuanTime:
        """[R] -> embeddings [R, d]"""
        embed = self.time_text_embed
        replaces = self.config.image_condition_type == "token_replace"
        return HunyuanTime(
            self.context_embedder.time_text_embed.embed_time(timestep),
            embed.embed_time(timestep),
            embed.embed_time(torch.zeros_like(timestep)) if replaces else None,
        )

    def _embedding(self, text: HunyuanText, time: HunyuanTime) -> Tensor:
        """[R, G, d], after SiLU; the first frame's, if it has its own, knows no guidance"""
        vector = time.vector if text.guidance is None else time.vector + text.guidance
        groups = [vector] if time.clean is None else [time.clean, vector]
        return F.silu(torch.stack([(g + text.pooled) for g in groups], dim=1))

    def _rope(self, latent_shape: Sequence[int]) -> Tensor:
        """[..., T, H, W] -> complex64 [N, D/2]"""
        positions = self.x_embedder.positions(latent_shape)
        return rope_table(positions, self.config.rope_axes_dim, self.config.rope_theta)
