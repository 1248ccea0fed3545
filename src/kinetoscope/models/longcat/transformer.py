"""The LongCat-Video transformer (arXiv 2510.22200; github meituan-longcat/LongCat-Video), parameter names as published.

R rows, T latent frames of M tokens each, N = T M tokens, d width, H heads of D channels. The first `num_cond_latents`
frames may be clean condition frames: they attend only to themselves and read no text, so what they contribute (keys and
values of every block) can be computed once and handed in as a cache, and the rest of the video then runs alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kinetoscope.attention import attention
from kinetoscope.core.context import Rows
from kinetoscope.core.errors import InputError
from kinetoscope.models.longcat.config import LongCatConfig
from kinetoscope.nn.embeddings import sinusoidal_embedding
from kinetoscope.nn.linear import Linear
from kinetoscope.nn.norm import FP32LayerNorm, ModulatedNorm, RMSNorm, gated_add
from kinetoscope.nn.patches import token_grid, unpatchify
from kinetoscope.nn.rope import apply_rope, rope_table, split_rope_dims
from kinetoscope.nn.split import TokenAxes
from kinetoscope.nn.stack import BlockCall, run_blocks
from kinetoscope.nn.swiglu import SwiGLU
from kinetoscope.nn.text_padding import PADDED, TRUE_LENGTH, read_text

EPS = 1e-6
TOKENS = TokenAxes(each={"rope": 0}, groups={"time": 1}, leading=("clean",))


class TextContext(NamedTuple):
    """What cross-attention needs of the text, one entry a block; rows first."""

    keys: list[Tensor]  # [R, L, H, D] each
    values: list[Tensor]  # [R, L, H, D] each
    key_bias: Tensor | None  # [R, L] float32, None: all tokens count once


class KeyValue(NamedTuple):
    """Keys, before rotation, and values of the condition frames in one block."""

    keys: Tensor  # [B, N_cond, H, D]
    values: Tensor  # [B, N_cond, H, D]


class Past(NamedTuple):
    """Condition frames that are not among the tokens."""

    pair: KeyValue
    rope: Tensor  # complex64 [N_cond, D/2]


class SelfAttention(nn.Module):
    """Attention over the tokens of the video: RMS norm a head, rotary positions, condition frames apart."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = Linear(dim, 3 * dim)
        self.q_norm = RMSNorm(head_dim, EPS)
        self.k_norm = RMSNorm(head_dim, EPS)
        self.proj = Linear(dim, dim)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[R, T, M, d] -> queries, keys (both normed, not rotated) and values [R, N, H, D]"""
        q, k, v = self.qkv(x).flatten(1, 2).unflatten(-1, (3, -1, self.head_dim)).unbind(2)
        return self.q_norm(q), self.k_norm(k), v

    def forward(
        self,
        x: Tensor,
        rope: Tensor,
        past: Past | None,
        rows: Rows | None = None,
        grid: tuple[int, int, int] | None = None,
    ) -> Tensor:
        """[R, T, M, d] -> [R, T, M, d]; see `attention` for rows and grid."""
        q, k, v = self.project(x)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        if past is None:
            out = attention(q, k, v, role="self", rows=rows, grid=grid)
        else:
            keys, values = (t.to(x.device).repeat(x.shape[0] // t.shape[0], 1, 1, 1) for t in past.pair)
            keys = apply_rope(keys, past.rope)
            k, v = torch.cat([keys, k], dim=1), torch.cat([values, v], dim=1)
            out = attention(q, k, v, role="self", lead=keys.shape[1])
        return self.proj(out.reshape(*x.shape[:-1], -1))


class CrossAttention(nn.Module):
    """Attention from the tokens of the video to those of the text."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_linear = Linear(dim, dim)
        self.kv_linear = Linear(dim, 2 * dim)
        self.proj = Linear(dim, dim)
        self.q_norm = RMSNorm(head_dim, EPS)
        self.k_norm = RMSNorm(head_dim, EPS)

    def project(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of embedded text: [R, L, d] -> two of [R, L, H, D]"""
        k, v = self.kv_linear(text).unflatten(-1, (2, -1, self.head_dim)).unbind(2)
        return self.k_norm(k), v.contiguous()

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, key_bias: Tensor | None) -> Tensor:
        """[R, N, d] -> [R, N, d]"""
        q = self.q_norm(self.q_linear(x).unflatten(-1, (-1, self.head_dim)))
        return self.proj(attention(q, keys, values, role="cross", key_bias=key_bias).flatten(2))


class LongCatSingleStreamBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each on a residual; a frame's timestep modulates its tokens."""

    def __init__(self, config: LongCatConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(config.adaln_tembed_dim, 6 * dim))
        self.mod_norm_attn = ModulatedNorm(dim, EPS)
        self.mod_norm_ffn = ModulatedNorm(dim, EPS)
        self.pre_crs_attn_norm = FP32LayerNorm(dim, EPS)
        self.attn = SelfAttention(dim, config.head_dim)
        self.cross_attn = CrossAttention(dim, config.head_dim)
        self.ffn = SwiGLU(dim, config.ffn_dim)

    def modulation(self, time: Tensor) -> tuple[Tensor, ...]:
        """[R, T, a] -> shift, scale, gate of attention, then of the feed-forward layer, float32 [R, T, 1, d] each"""
        with torch.autocast(time.device.type, enabled=False):
            return self.adaLN_modulation(time).unsqueeze(2).chunk(6, dim=-1)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        text: tuple[Tensor, Tensor, Tensor | None],
        rope: Tensor,
        clean: int,
        past: Past | None,
        rows: Rows | None = None,
        grid: tuple[int, int, int] | None = None,
    ) -> Tensor:
        """x [R, T, M, d], time [R, T, a] -> [R, T, M, d]; the first `clean` tokens are of condition frames"""
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.modulation(time)
        x = gated_add(x, self.attn(self.mod_norm_attn(x, shift_a, 1 + scale_a), rope, past, rows, grid), gate_a)
        given, noisy = x.flatten(1, 2).tensor_split([clean], dim=1)  # condition frames read no text
        noisy = noisy + self.cross_attn(self.pre_crs_attn_norm(noisy), *text)
        x = (torch.cat([given, noisy], dim=1) if clean else noisy).view(x.shape)
        return gated_add(x, self.ffn(self.mod_norm_ffn(x, shift_f, 1 + scale_f)), gate_f)

    def condition(self, x: Tensor, time: Tensor, rope: Tensor) -> tuple[Tensor, KeyValue]:
        """The block over condition frames alone: x [B, T, M, d] -> the same, and its keys and values"""
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.modulation(time)
        normed = self.mod_norm_attn(x, shift_a, 1 + scale_a)
        q, k, v = self.attn.project(normed)
        out = attention(apply_rope(q, rope), apply_rope(k, rope), v, role="self")
        x = gated_add(x, self.attn.proj(out.reshape(*x.shape[:-1], -1)), gate_a)
        x = gated_add(x, self.ffn(self.mod_norm_ffn(x, shift_f, 1 + scale_f)), gate_f)
        return x, KeyValue(k, v)


def condition_rows(clean: int, tokens: int) -> Rows:
    """Condition tokens attend to themselves, the others to all."""
    return (((0, clean), ((0, clean),)), ((clean, tokens), ((0, tokens),)))


class TimestepEmbedder(nn.Module):
    """Sinusoids of the timestep through two linear layers, float32."""

    def __init__(self, config: LongCatConfig) -> None:
        super().__init__()
        self.size = config.frequency_embedding_size
        dim = config.adaln_tembed_dim
        self.mlp = nn.Sequential(Linear(self.size, dim), nn.SiLU(), Linear(dim, dim))

    def forward(self, timestep: Tensor) -> Tensor:
        """[R, T] -> [R, T, a]"""
        with torch.autocast(timestep.device.type, enabled=False):
            return self.mlp(sinusoidal_embedding(timestep, self.size))


class CaptionEmbedder(nn.Module):
    """Two linear layers with a tanh GELU, from the text encoder's width to the model's."""

    def __init__(self, config: LongCatConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.y_proj = nn.Sequential(Linear(config.caption_channels, dim), nn.GELU(approximate="tanh"), Linear(dim, dim))

    def forward(self, text: Tensor) -> Tensor:
        """[R, L, caption_channels] -> [R, L, d]"""
        return self.y_proj(text)


class PatchEmbed3D(nn.Module):
    """Patches to tokens."""

    def __init__(self, config: LongCatConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel_size=patch, stride=patch)

    def forward(self, latents: Tensor) -> Tensor:
        """[R, C, T, H, W] -> [R, T, M, d]"""
        weight = self.proj.weight
        return self.proj(latents.to(weight.dtype)).to(weight.dtype).permute(0, 2, 3, 4, 1).flatten(2, 3)


class FinalLayer(nn.Module):
    """The last norm, modulated, and the projection to patches, float32 throughout."""

    def __init__(self, config: LongCatConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.norm_final = ModulatedNorm(dim, EPS)
        self.linear = Linear(dim, math.prod(config.patch_size) * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(config.adaln_tembed_dim, 2 * dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [R, T, M, d], time [R, T, a] -> [R, T, M, ph pw C]"""
        with torch.autocast(x.device.type, enabled=False):
            shift, scale = self.adaLN_modulation(time).unsqueeze(2).chunk(2, dim=-1)  # [R, T, 1, d]
            return self.linear(self.norm_final(x.float(), shift, 1 + scale))


class LongCatVideoTransformer3DModel(nn.Module):
    """LongCat-Video transformer: text to video, and continuation of clean condition frames.

    Its output is the negative of the flow velocity n - x0 (`spec.CONVENTION.sign`).

    Args:
        config: published sizes.
    """

    keep_in_float32 = ("t_embedder", "adaLN_modulation", "final_layer", "pre_crs_attn_norm")

    def __init__(self, config: LongCatConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.x_embedder = PatchEmbed3D(config)
        self.t_embedder = TimestepEmbedder(config)
        self.y_embedder = CaptionEmbedder(config)
        self.blocks = nn.ModuleList(LongCatSingleStreamBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)

    def prepare_conditioning(
        self, *, encoder_hidden_states: Tensor, text_lengths: Tensor | None = None, text_mode: str = PADDED
    ) -> dict[str, TextContext]:
        """Keys and values of the text for all blocks, once a run.

        Beyond the true length the projected text is set to zero, and the published model attends to those zeros
        (`text_tokens_zero_pad`), which are folded into one. Without `text_tokens_zero_pad` they are masked.

        Args:
            encoder_hidden_states: [R, L, caption_channels].
            text_lengths: [R] true lengths; None: all L tokens are text.
            text_mode: whether the zeros are attended to (`nn.text_padding.read_text`).

        Raises:
            InputError: a length is not in [0, L].
        """
        text, key_bias, padding = encoder_hidden_states, None, None
        if text_lengths is not None:
            if not self.config.text_tokens_zero_pad:
                text_mode = TRUE_LENGTH
            text, key_bias = read_text(text, text_lengths, text_mode)
            positions = torch.arange(text.shape[1], device=text.device)
            padding = positions >= text_lengths.to(text.device).unsqueeze(1)  # [R, L']
        embedded = self.y_embedder(text.to(self.x_embedder.proj.weight.dtype))  # [R, L', d]
        if padding is not None:
            embedded = embedded.masked_fill(padding.unsqueeze(-1), 0.0)
        pairs = [block.cross_attn.project(embedded) for block in self._blocks()]
        return {"text": TextContext([k for k, _ in pairs], [v for _, v in pairs], key_bias)}

    def prepare_timesteps(self, timesteps: Tensor) -> dict[str, Tensor]:
        """Nothing: which frames a timestep belongs to is known only in the forward."""
        return {}

    def prepare_shared(self, latent_shape: Sequence[int]) -> dict[str, Tensor]:
        """Rotary table of a latent shape [..., T, H, W], condition frames included, once a run.

        Raises:
            InputError: a size is not a multiple of the patch.
        """
        return {"rope": self._rope(latent_shape)}

    def cache_condition(self, latents: Tensor) -> list[KeyValue]:
        """Keys (before rotation) and values of clean condition frames at timestep 0, for every block.

        Args:
            latents: [B, C, T_cond, H, W].
        """
        rope = self._rope(latents.shape)
        x = self.x_embedder(latents)  # [B, T_cond, M, d]
        time = self.t_embedder(torch.zeros(x.shape[:2], device=x.device))  # [B, T_cond, a]
        cache: list[KeyValue] = []
        for block in self._blocks():
            x, pair = block.condition(x, time, rope)
            cache.append(pair)
        return cache

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *,
        text_lengths: Tensor | None = None,
        text: TextContext | None = None,
        rope: Tensor | None = None,
        num_cond_latents: int = 0,
        kv_cache: Sequence[KeyValue] | None = None,
    ) -> Tensor:
        """Predicted negative flow velocity.

        Args:
            latents: [R, C, T, H, W]; with `kv_cache` without the condition frames.
            timestep: [R] in [0, 1000], or [R, T]: one a latent frame (0 for condition frames).
            encoder_hidden_states: [R, L, caption_channels]; needed unless `text` is given.
            text_lengths: see `prepare_conditioning`.
            text, rope: what the `prepare_*` methods return; `rope` covers condition frames and all.
            num_cond_latents: leading condition frames, in `latents` or in `kv_cache`.
            kv_cache: what `cache_condition` returns, [B, ...] where B divides R (rows are branch-major).

        Returns:
            [R, C, T, H, W] float32.

        Raises:
            InputError: no text, or sizes that do not fit.
        """
        frames, height, width = latents.shape[2:]
        if rope is None:
            rope = self._rope((frames + (num_cond_latents if kv_cache is not None else 0), height, width))
        if text is None:
            if encoder_hidden_states is None:
                raise InputError("the LongCat transformer needs encoder_hidden_states or prepared text")
            text = self.prepare_conditioning(encoder_hidden_states=encoder_hidden_states, text_lengths=text_lengths)[
                "text"
            ]
        x = self.x_embedder(latents)  # [R, T, M, d]
        if timestep.ndim == 1:
            timestep = timestep.unsqueeze(1).expand(-1, frames)
        time = self.t_embedder(timestep.to(x.dtype).float())  # [R, T, a]; published: timesteps in the compute dtype
        grid = token_grid((frames, height, width), self.config.patch_size)
        before, rope = rope.tensor_split([len(rope) - math.prod(grid)])
        pasts = [None] * len(self.blocks) if kv_cache is None else [Past(pair, before) for pair in kv_cache]
        clean = 0 if kv_cache is not None else num_cond_latents * grid[1] * grid[2]
        rows = condition_rows(clean, math.prod(grid)) if clean else None
        calls = [
            BlockCall(block, {"time": time, "text": (k, v, text.key_bias)},
                      {"rope": rope, "clean": clean, "past": past, "rows": rows, "grid": grid}, TOKENS)
            for block, k, v, past in zip(self.blocks, text.keys, text.values, pasts, strict=True)
        ]  # fmt: skip
        x = run_blocks(x, calls)  # [R, T, M, d]
        return unpatchify(self.final_layer(x, time), grid, self.config.patch_size)

    def _blocks(self) -> list[LongCatSingleStreamBlock]:
        return [block for block in self.blocks if isinstance(block, LongCatSingleStreamBlock)]

    def _rope(self, latent_shape: Sequence[int]) -> Tensor:
        """[..., T, H, W] -> complex64 [N, D/2]"""
        grid = token_grid(latent_shape, self.config.patch_size)
        positions = [torch.arange(n, device=self.x_embedder.proj.weight.device) for n in grid]
        return rope_table(positions, split_rope_dims(self.config.head_dim))
