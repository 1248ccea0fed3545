"""The SkyReels-V2 video transformer (arXiv 2504.13074), parameter names as in the published diffusers checkpoints.

Wan's block; beyond it one timestep a latent frame (diffusion forcing), attention that may be causal in blocks of
frames, and a frame rate that conditions the modulation. R rows, F modulation groups of M tokens each (F = 1: one
timestep a row), N = F M tokens, d width, H heads of D channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kinetoscope.attention import attention
from kinetoscope.core.errors import InputError
from kinetoscope.models.skyreels.config import SkyReelsConfig
from kinetoscope.nn.embeddings import ImageProjection, TextProjection, TimestepEmbedding
from kinetoscope.nn.feed_forward import FeedForward
from kinetoscope.nn.linear import Linear
from kinetoscope.nn.norm import FP32LayerNorm, ModulatedNorm, RMSNorm, gated_add
from kinetoscope.nn.patches import token_grid, unpatchify
from kinetoscope.nn.rope import apply_rope, rope_table, split_rope_dims
from kinetoscope.nn.split import TokenAxes
from kinetoscope.nn.stack import BlockCall, run_blocks
from kinetoscope.nn.text_padding import PADDED, read_before_text, read_text

SLOW_FPS = 16
"""The frame rate that has an embedding of its own; all others share one."""

Pair = tuple[Tensor, Tensor]
"""Keys and values [R, L, H, D]."""

Rows = tuple[tuple[tuple[int, int], tuple[tuple[int, int], ...]], ...]
"""Which queries attend to which keys; see `attention`."""

TOKENS = TokenAxes(each={"rope": 0}, groups={"projected": 1})
"""Which arguments of a block go with its tokens."""


class TextContext(NamedTuple):
    """What cross-attention needs of text and image, one entry a block; rows first."""

    text: list[Pair]
    key_bias: Tensor | None  # [R, L] float32, None: all tokens count once
    image: list[Pair] | None  # None: a model without image features


class Modulation(NamedTuple):
    """What timestep and frame rate give, before the tables of the blocks are added."""

    projected: Tensor  # [R or 1, F, 6, d]
    embedded: Tensor  # [R or 1, F, d]


def block_rows(tokens: int, block: int) -> Rows | None:
    """A token sees its block of so many tokens and those before; None: all of them, where they are one block."""
    if block == tokens:
        return None
    return tuple(((end - block, end), ((0, end),)) for end in range(block, tokens + 1, block))


class SelfAttention(nn.Module):
    """Attention over the tokens of the video, RMS norm over all heads at once, rotary positions."""

    def __init__(self, config: SkyReelsConfig) -> None:
        super().__init__()
        dim = config.dim
        self.head_dim = config.attention_head_dim
        self.to_q = Linear(dim, dim)
        self.to_k = Linear(dim, dim)
        self.to_v = Linear(dim, dim)
        self.to_out = nn.Sequential(Linear(dim, dim))
        self.norm_q = RMSNorm(dim, config.eps)
        self.norm_k = RMSNorm(dim, config.eps)

    def forward(self, x: Tensor, rope: Tensor, rows: Rows | None, grid: tuple[int, int, int] | None = None) -> Tensor:
        """[R, N, d] -> [R, N, d]; see `attention` for rows and grid."""
        heads = (-1, self.head_dim)
        q = apply_rope(self.norm_q(self.to_q(x)).unflatten(-1, heads), rope)  # [R, N, H, D]
        k = apply_rope(self.norm_k(self.to_k(x)).unflatten(-1, heads), rope)  # [R, N, H, D]
        v = self.to_v(x).unflatten(-1, heads)  # [R, N, H, D]
        return self.to_out(attention(q, k, v, role="self", grid=grid, rows=rows).flatten(2))


class CrossAttention(nn.Module):
    """Attention from the tokens of the video to those of the text and, added to it, to those of an image."""

    def __init__(self, config: SkyReelsConfig) -> None:
        super().__init__()
        dim, added = config.dim, config.added_kv_proj_dim
        self.head_dim = config.attention_head_dim
        self.to_q = Linear(dim, dim)
        self.to_k = Linear(dim, dim)
        self.to_v = Linear(dim, dim)
        self.to_out = nn.Sequential(Linear(dim, dim))
        self.norm_q = RMSNorm(dim, config.eps)
        self.norm_k = RMSNorm(dim, config.eps)
        if added is not None:
            self.add_k_proj = Linear(added, dim)
            self.add_v_proj = Linear(added, dim)
            self.norm_added_k = RMSNorm(dim, config.eps)

    def project(self, text: Tensor) -> Pair:
        """Keys and values of embedded text [R, L, d]"""
        heads = (-1, self.head_dim)
        return self.norm_k(self.to_k(text)).unflatten(-1, heads), self.to_v(text).unflatten(-1, heads)

    def project_image(self, features: Tensor) -> Pair:
        """Keys and values of embedded image features [R, I, d]"""
        heads = (-1, self.head_dim)
        keys = self.norm_added_k(self.add_k_proj(features)).unflatten(-1, heads)
        return keys, self.add_v_proj(features).unflatten(-1, heads)

    def forward(self, x: Tensor, text: Pair, key_bias: Tensor | None, image: Pair | None) -> Tensor:
        """[R, N, d] -> [R, N, d]"""
        q = self.norm_q(self.to_q(x)).unflatten(-1, (-1, self.head_dim))  # [R, N, H, D]
        out = attention(q, *text, role="cross", key_bias=key_bias)
        if image is not None:
            out = out + attention(q, *image, role="cross")
        return self.to_out(out.flatten(2))


class SkyReelsV2TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each on a residual."""

    def __init__(self, config: SkyReelsConfig) -> None:
        super().__init__()
        dim, eps = config.dim, config.eps
        self.norm1 = ModulatedNorm(dim, eps)
        self.attn1 = SelfAttention(config)
        self.attn2 = CrossAttention(config)
        self.norm2 = FP32LayerNorm(dim, eps) if config.cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(dim, config.ffn_dim)
        self.norm3 = ModulatedNorm(dim, eps)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 6, dim))

    def forward(
        self,
        x: Tensor,
        text: Pair,
        key_bias: Tensor | None,
        image: Pair | None,
        projected: Tensor,
        rope: Tensor,
        rows: Rows | None,
        grid: tuple[int, int, int] | None = None,
    ) -> Tensor:
        """x [R, F, M, d], projected [R or 1, F, 6, d] -> [R, F, M, d]"""
        table = (self.scale_shift_table.float() + projected.float()).unsqueeze(3)  # [R, F, 6, 1, d]
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = table.unbind(2)  # [R, F, 1, d] each
        y = self.attn1(self.norm1(x, shift_a, 1 + scale_a).flatten(1, 2), rope, rows, grid)
        x = gated_add(x, y.view_as(x), gate_a)
        x = x + self.attn2(self.norm2(x).flatten(1, 2), text, key_bias, image).view_as(x)
        return gated_add(x, self.ffn(self.norm3(x, shift_f, 1 + scale_f)), gate_f)


class ConditionEmbedder(nn.Module):
    """Embeddings of timestep, text and image."""

    def __init__(self, config: SkyReelsConfig) -> None:
        super().__init__()
        self.freq_dim = config.freq_dim
        self.time_embedder = TimestepEmbedding(config.freq_dim, config.dim)
        self.time_proj = Linear(config.dim, 6 * config.dim)
        self.text_embedder = TextProjection(config.text_dim, config.dim)
        if config.image_dim is not None:
            self.image_embedder = ImageProjection(config.image_dim, config.dim, config.pos_embed_seq_len)

    def embed_time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """[R, F] -> six-way projection [R, F, 6, d] and embedding [R, F, d]; angles in float64, as published."""
        half = self.freq_dim // 2
        frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
        angle = timestep.double().unsqueeze(-1) * frequencies
        waves = torch.cat([angle.cos(), angle.sin()], dim=-1)
        embedded = self.time_embedder(waves).to(self.time_proj.weight.dtype)
        return self.time_proj(nn.functional.silu(embedded)).unflatten(-1, (6, -1)), embedded


class SiLUProjection(nn.Module):
    """Linear then SiLU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]"""
        return nn.functional.silu(self.proj(x))


class FrameRateProjection(nn.Module):
    """The frame rate's part of the modulation. The identity at index 1 keeps the published indices."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(SiLUProjection(dim), nn.Identity(), Linear(dim, 6 * dim))

    def forward(self, x: Tensor) -> Tensor:
        """[d] -> [6, d]"""
        return self.net(x).unflatten(-1, (6, -1))


class SkyReelsV2Transformer3DModel(nn.Module):
    """SkyReels-V2 video transformer: text-to-video, image-to-video and diffusion forcing.

    Built on the meta device it has exactly the names and shapes of a published checkpoint; `keep_in_float32` names the
    parts whose weights stay float32 when the rest is in bfloat16.

    Args:
        config: published sizes.
    """

    keep_in_float32 = ("time_embedder", "scale_shift_table", "norm2")

    def __init__(self, config: SkyReelsConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        patch = config.patch_size
        self.patch_embedding = nn.Conv3d(config.in_channels, config.dim, kernel_size=patch, stride=patch)
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks = nn.ModuleList(SkyReelsV2TransformerBlock(config) for _ in range(config.num_layers))
        self.norm_out = ModulatedNorm(config.dim, config.eps)
        self.proj_out = Linear(config.dim, (config.out_channels or config.in_channels) * math.prod(patch))
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 2, config.dim))
        if config.inject_sample_info:
            self.fps_embedding = nn.Embedding(2, config.dim)
            self.fps_projection = FrameRateProjection(config.dim)

    def prepare_conditioning(
        self,
        *,
        encoder_hidden_states: Tensor,
        text_lengths: Tensor | None = None,
        text_mode: str = PADDED,
        image_embeds: Tensor | None = None,
    ) -> dict[str, TextContext]:
        """Keys and values of text and image for all blocks, once a run.

        Args:
            encoder_hidden_states: [R, L, text_dim]; zero padding is attended to, as the model learned.
            text_lengths: [R] true lengths; every token beyond must be zero, and is folded into one. None: use all L
                tokens as they are.
            text_mode: whether the zeros are attended to (`nn.text_padding.read_text`).
            image_embeds: [R, I, image_dim] for models that read image features.

        Raises:
            InputError: a length is not in [0, L]; image features are given to a model without them, or the reverse.
        """
        reads = self.config.image_dim if image_embeds is not None else self.config.added_kv_proj_dim
        if (image_embeds is None) != (reads is None):  # where no layer is their own, image features may be left out
            needs = "needs" if image_embeds is None else "takes no"
            raise InputError(f"this SkyReels-V2 transformer {needs} image features (image_dim={self.config.image_dim})")
        bias = None
        if text_lengths is not None:
            encoder_hidden_states, bias = read_text(encoder_hidden_states, text_lengths, text_mode)
        embedder, dtype = self.condition_embedder, self.proj_out.weight.dtype
        text = embedder.text_embedder(encoder_hidden_states.to(dtype))  # [R, L', d]
        images = None
        if image_embeds is not None:
            features = embedder.image_embedder(image_embeds.to(dtype))  # [R, I, d]
            if self.config.added_kv_proj_dim is None:
                text, bias = read_before_text(features, text, bias)
            else:
                images = [block.attn2.project_image(features) for block in self._blocks()]
        pairs = [block.attn2.project(text) for block in self._blocks()]
        return {"text": TextContext(pairs, bias, images)}

    def prepare_timesteps(self, timesteps: Tensor, *, fps: float = 24.0) -> dict[str, Modulation]:
        """Modulation of each of S steps, once a run: [S], or [S, F] for one timestep a latent frame.

        Each is computed alone, so a step has the same bits as a forward of one row that was given its timestep.
        """
        steps = [self._modulation(t.view(1, -1), fps) for t in timesteps]
        projected, embedded = (torch.cat(parts) for parts in zip(*steps, strict=True))
        return {"modulation": Modulation(projected, embedded)}

    def prepare_shared(self, latent_shape: Sequence[int], *, frames_per_block: int | None = None) -> dict[str, object]:
        """Rotary table of a latent shape [..., T, H, W], and the tokens of a causal block, once a run.

        Args:
            latent_shape: of the latents.
            frames_per_block: latent frames that see each other and those before; 1 lets all see all. None: as the
                configuration says.

        Raises:
            InputError: a size is not a multiple of the patch, or has more positions than the model knows; T is not a
                whole number of blocks.
        """
        rope = self._rope(latent_shape)
        frames, per_block = latent_shape[-3] // self.config.patch_size[0], frames_per_block
        if per_block is None:
            per_block = self.config.num_frame_per_block
        if per_block == 1:
            per_block = frames
        if frames % per_block:
            raise InputError(f"{frames} latent frames are not a whole number of causal blocks of {per_block}")
        return {"rope": rope, "block_tokens": len(rope) // frames * per_block}

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *,
        text_lengths: Tensor | None = None,
        image_embeds: Tensor | None = None,
        fps: float = 24.0,
        frames_per_block: int | None = None,
        text: TextContext | None = None,
        modulation: Modulation | None = None,
        rope: Tensor | None = None,
        block_tokens: int | None = None,
    ) -> Tensor:
        """Predicted flow velocity.

        Args:
            latents: [R, C, T, H, W].
            timestep: [R] in [0, 1000], or [R, F]: one for each latent frame.
            encoder_hidden_states: [R, L, text_dim]; needed unless `text` is given.
            text_lengths, image_embeds: see `prepare_conditioning`.
            fps: frames a second, for models conditioned on it: 16, or anything else.
            frames_per_block: see `prepare_shared`.
            text, modulation, rope, block_tokens: what the `prepare_*` methods return.

        Returns:
            [R, C, T, H, W] in the dtype of `latents`.
        """
        if rope is None or block_tokens is None:
            shared = self.prepare_shared(latents.shape, frames_per_block=frames_per_block)
            rope, block_tokens = shared["rope"], shared["block_tokens"]  # pyright: ignore[reportAssignmentType]
        assert rope is not None and block_tokens is not None
        if modulation is None:
            modulation = self._modulation(timestep if timestep.ndim == 2 else timestep.unsqueeze(1), fps)
        if text is None:
            if encoder_hidden_states is None:
                raise InputError("the SkyReels-V2 transformer needs encoder_hidden_states or prepared text")
            text = self.prepare_conditioning(
                encoder_hidden_states=encoder_hidden_states, text_lengths=text_lengths, image_embeds=image_embeds
            )["text"]

        dtype = self.patch_embedding.weight.dtype
        x = self.patch_embedding(latents.to(dtype)).to(dtype)  # [R, d, T', H', W']
        frames, height, width = grid = x.shape[2:]
        groups = modulation.embedded.shape[1]
        x = x.flatten(2).transpose(1, 2).contiguous().unflatten(1, (groups, -1))  # [R, F, M, d]
        images = text.image or [None] * len(self.blocks)
        own = {"key_bias": text.key_bias, "projected": modulation.projected}
        rows = block_rows(len(rope), block_tokens)
        shared = {"rope": rope, "rows": rows, "grid": (frames, height, width) if rows is None else None}
        x = run_blocks(x, [
            BlockCall(block, {"text": pair, "image": image, **own}, shared, TOKENS)
            for block, pair, image in zip(self.blocks, text.text, images, strict=True)
        ])  # [R, F, M, d]  # fmt: skip
        table = self.scale_shift_table.float() + modulation.embedded.float().unsqueeze(2)  # [R, F, 2, d]
        shift, scale = table.unsqueeze(3).unbind(2)  # [R, F, 1, d] each
        x = self.proj_out(self.norm_out(x, shift, 1 + scale))  # [R, F, M, pt ph pw C]
        return unpatchify(x, grid, self.config.patch_size).to(latents.dtype)

    def _blocks(self) -> list[SkyReelsV2TransformerBlock]:
        return [block for block in self.blocks if isinstance(block, SkyReelsV2TransformerBlock)]

    def _modulation(self, timestep: Tensor, fps: float) -> Modulation:
        """[R, F] -> six-way projection and embedding"""
        projected, embedded = self.condition_embedder.embed_time(timestep)
        if self.config.inject_sample_info:
            index = torch.full((), int(fps != SLOW_FPS), device=timestep.device)
            projected = projected + self.fps_projection(self.fps_embedding(index))  # [R, F, 6, d]
        return Modulation(projected, embedded)

    def _rope(self, latent_shape: Sequence[int]) -> Tensor:
        """[..., T, H, W] -> complex64 [N, D/2]"""
        grid = token_grid(latent_shape, self.config.patch_size, (self.config.rope_max_seq_len,) * 3)
        positions = [torch.arange(n, device=self.proj_out.weight.device) for n in grid]
        return rope_table(positions, split_rope_dims(self.config.attention_head_dim))
