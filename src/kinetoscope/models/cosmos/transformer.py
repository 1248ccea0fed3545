"""The Cosmos Predict transformer (arXiv 2501.03575), parameter names as in the published diffusers checkpoints.

R rows, F modulation groups of M tokens each (F = 1: one timestep a row), N = F M tokens, d width, H heads of D
channels.
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
from kinetoscope.models.cosmos.config import CosmosConfig
from kinetoscope.nn.embeddings import sinusoidal_embedding
from kinetoscope.nn.linear import Linear
from kinetoscope.nn.norm import ModulatedNorm, RMSNorm, gated_add, unit_scales
from kinetoscope.nn.patches import LearnedPositions, LinearPatchEmbedding, token_grid
from kinetoscope.nn.rope import split_rope_dims
from kinetoscope.nn.rope_halves import apply_rope_halves, halves_rope_table
from kinetoscope.nn.split import TokenAxes
from kinetoscope.nn.stack import BlockCall, run_blocks
from kinetoscope.nn.text_padding import PADDED, read_text

NORM_EPS = 1e-6
QK_NORM_EPS = 1e-5
BASE_FPS = 24.0  # rotary time positions count frames at this rate
ROPE_THETA = 10000.0
TOKENS = TokenAxes(each={"rope": 0, "positions": 0}, groups={"modulation": 1})
"""Which arguments of a block go with its tokens."""


class TextContext(NamedTuple):
    """What cross-attention needs of the text, one entry a block; rows first."""

    keys: list[Tensor]  # [R, L, H, D] each
    values: list[Tensor]  # [R, L, H, D] each
    key_bias: Tensor | None  # [R, L] float32, None: all tokens count once


class Modulation(NamedTuple):
    """What the timestep sets, float32. Scales include their 1."""

    blocks: Tensor  # [R or 1, F, layers, 3, 3, d]: of each of three sublayers shift, scale, gate
    out: Tensor  # [R or 1, F, 2, d]: shift, scale of the last norm


class Attention(nn.Module):
    """Projections of an attention layer, RMS norm on the queries and keys of each head; no biases."""

    def __init__(self, dim: int, context_dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.to_q = Linear(dim, dim, bias=False)
        self.to_k = Linear(context_dim, dim, bias=False)
        self.to_v = Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(Linear(dim, dim, bias=False))
        self.norm_q = RMSNorm(head_dim, QK_NORM_EPS)
        self.norm_k = RMSNorm(head_dim, QK_NORM_EPS)

    def query(self, x: Tensor) -> Tensor:
        """[R, F, M, d] -> [R, N, H, D]"""
        return self.norm_q(self.to_q(x).flatten(1, 2).unflatten(-1, (-1, self.head_dim)))

    def project(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values: [R, L, c] -> two of [R, L, H, D]"""
        heads = (-1, self.head_dim)
        return self.norm_k(self.to_k(context).unflatten(-1, heads)), self.to_v(context).unflatten(-1, heads)


class SelfAttention(Attention):
    """Attention over the tokens of the video with rotary positions."""

    def forward(self, x: Tensor, rope: Tensor, grid: tuple[int, int, int] | None = None) -> Tensor:
        """[R, F, M, d] -> [R, F, M, d]"""
        keys, values = self.project(x.flatten(1, 2))
        q, k = apply_rope_halves(self.query(x), rope), apply_rope_halves(keys, rope)  # [R, N, H, D] each
        return self.to_out(attention(q, k, values, role="self", grid=grid).reshape(*x.shape[:-1], -1))


class CrossAttention(Attention):
    """Attention from the tokens of the video to those of the text."""

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, key_bias: Tensor | None) -> Tensor:
        """[R, F, M, d] -> [R, F, M, d]"""
        out = attention(self.query(x), keys, values, role="cross", key_bias=key_bias)
        return self.to_out(out.reshape(*x.shape[:-1], -1))


class GELULinear(nn.Module):
    """Linear then exact GELU."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.proj = Linear(dim, hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., hidden_dim]"""
        return F.gelu(self.proj(x))


class FeedForward(nn.Module):
    """Linear, GELU, linear, no biases. The identity keeps the published indices (dropout, never active)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GELULinear(dim, hidden_dim), nn.Identity(), Linear(hidden_dim, dim, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]"""
        return self.net(x)


class AdaptiveNorm(ModulatedNorm):
    """A norm whose `parts` modulation vectors are the timestep's own plus a low-rank function of its embedding."""

    def __init__(self, dim: int, rank: int, parts: int) -> None:
        super().__init__(dim, NORM_EPS)
        self.parts = parts
        self.linear_1 = Linear(dim, rank, bias=False)
        self.linear_2 = Linear(rank, parts * dim, bias=False)

    def modulation(self, embedding: Tensor, shared: Tensor) -> Tensor:
        """embedding [R, F, d], shared [R, F, 3 d] -> [R, F, parts, d] float32; the scale does not include its 1"""
        own = self.linear_2(self.linear_1(F.silu(embedding)))  # [R, F, parts d]
        return (own.float() + shared[..., : own.shape[-1]].float()).unflatten(-1, (self.parts, -1))


class CosmosTransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each modulated and gated on a residual."""

    def __init__(self, config: CosmosConfig) -> None:
        super().__init__()
        dim, head_dim, rank = config.dim, config.attention_head_dim, config.adaln_lora_dim
        self.norm1 = AdaptiveNorm(dim, rank, 3)
        self.attn1 = SelfAttention(dim, dim, head_dim)
        self.norm2 = AdaptiveNorm(dim, rank, 3)
        self.attn2 = CrossAttention(dim, config.text_embed_dim, head_dim)
        self.norm3 = AdaptiveNorm(dim, rank, 3)
        self.ff = FeedForward(dim, int(dim * config.mlp_ratio))

    def modulation(self, embeddings: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Return [R, F, 3 sublayers, 3, d] for each embedding [R, F, d] with shared modulation [R, F, 3 d]."""
        norms = (self.norm1, self.norm2, self.norm3)
        return [torch.stack([n.modulation(*embedding) for n in norms], dim=2) for embedding in embeddings]

    def forward(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        key_bias: Tensor | None,
        modulation: Tensor,
        rope: Tensor,
        positions: Tensor | None,
        grid: tuple[int, int, int] | None = None,
    ) -> Tensor:
        """x [R, F, M, d], modulation [R or 1, F, 3, 3, d], positions [N, d] -> [R, F, M, d]"""
        parts = modulation.unsqueeze(4).unbind(2)  # three of [R, F, 3, 1, d]
        (shift_s, scale_s, gate_s), (shift_c, scale_c, gate_c), (shift_f, scale_f, gate_f) = (
            p.unbind(2) for p in parts
        )
        if positions is not None:
            x = x + positions.view(x.shape[1:])
        x = gated_add(x, self.attn1(self.norm1(x, shift_s, scale_s), rope, grid), gate_s)
        x = gated_add(x, self.attn2(self.norm2(x, shift_c, scale_c), keys, values, key_bias), gate_c)
        return gated_add(x, self.ff(self.norm3(x, shift_f, scale_f)), gate_f)


class TimestepProjection(nn.Module):
    """Two linear layers, to a modulation shared by all norms."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_1 = Linear(dim, dim, bias=False)
        self.linear_2 = Linear(dim, 3 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., 3 d]"""
        return self.linear_2(F.silu(self.linear_1(x)))


class TimeEmbedding(nn.Module):
    """The sinusoidal embedding of a timestep, normed, and its projection."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.t_embedder = TimestepProjection(dim)
        self.norm = RMSNorm(dim, NORM_EPS)

    def forward(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """[R, F] -> embedding [R, F, d], shared modulation [R, F, 3 d]"""
        waves = sinusoidal_embedding(timestep, self.t_embedder.linear_1.in_features)
        waves = waves.to(self.t_embedder.linear_1.weight.dtype)
        return self.norm(waves), self.t_embedder(waves)


class CosmosTransformer3DModel(nn.Module):
    """Cosmos Predict transformer: 1 and 2 (text-to-world, video-to-world, text-to-image) and 2.5.

    Args:
        config: published sizes.
    """

    keep_in_float32 = ("learnable_pos_embed",)

    def __init__(self, config: CosmosConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.patch_embed = LinearPatchEmbedding(
            config.in_channels + config.concat_padding_mask, config.dim, config.patch_size
        )
        learned = config.extra_pos_embed_type is not None
        self.learnable_pos_embed = LearnedPositions(config.dim, config.max_tokens) if learned else None
        self.time_embed = TimeEmbedding(config.dim)
        self.transformer_blocks = nn.ModuleList(CosmosTransformerBlock(config) for _ in range(config.num_layers))
        self.norm_out = AdaptiveNorm(config.dim, config.adaln_lora_dim, 2)
        self.proj_out = Linear(config.dim, config.out_channels * math.prod(config.patch_size), bias=False)
        if config.use_crossattn_projection:
            self.crossattn_proj = nn.Sequential(
                Linear(config.crossattn_proj_in_channels, config.encoder_hidden_states_channels), nn.GELU()
            )

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks in order, for what works block by block (compilation)."""
        return self.transformer_blocks

    def prepare_conditioning(
        self, *, encoder_hidden_states: Tensor, text_lengths: Tensor | None = None, text_mode: str = PADDED
    ) -> dict[str, TextContext]:
        """Keys and values of the text for all blocks, once a run.

        Args:
            encoder_hidden_states: [R, L, c].
            text_lengths: [R] true lengths where every token beyond is zero: Predict 1 and 2 attend to that padding,
                which is then folded into one token. None: use all L tokens as they are.
            text_mode: whether the zeros are attended to (`nn.text_padding.read_text`).

        Raises:
            InputError: a length is not in [0, L], or lengths were given to a model that projects its text.
        """
        text, key_bias = encoder_hidden_states, None
        if text_lengths is not None:
            if self.config.use_crossattn_projection:
                raise InputError("this Cosmos model reads all tokens of its text encoder; it takes no text_lengths")
            text, key_bias = read_text(text, text_lengths, text_mode)
        text = text.to(self.proj_out.weight.dtype)
        if self.config.use_crossattn_projection:
            text = self.crossattn_proj(text)
        pairs = [block.attn2.project(text) for block in self._blocks()]
        return {"text": TextContext([k for k, _ in pairs], [v for _, v in pairs], key_bias)}

    def prepare_timesteps(self, timesteps: Tensor) -> dict[str, Modulation]:
        """Modulation of each of S timesteps, or of S sets of one a latent frame: [S] or [S, F] -> leading dimension S.

        Each is computed alone, so a step has the same bits as a forward of one row that was given its timestep.
        """
        steps = self._modulation([t.view(1, -1) for t in timesteps])
        return {"modulation": Modulation(torch.cat([s.blocks for s in steps]), torch.cat([s.out for s in steps]))}

    def prepare_shared(self, latent_shape: Sequence[int], *, fps: float | None = None) -> dict[str, Tensor]:
        """Positions of a latent shape [..., T, H, W], once a run.

        Args:
            latent_shape: see above.
            fps: frames a second of the video, which stretches time; None: one position a latent frame (images).

        Raises:
            InputError: a size is not a multiple of the patch, or has more positions than the model knows; or `fps` is
                not positive.
        """
        grid = self._grid(latent_shape)
        shared = {"rope": self._rope(grid, fps)}
        if self.learnable_pos_embed is not None:
            shared["positions"] = self.learnable_pos_embed(grid)
        return shared

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *,
        fps: float | None = None,
        condition_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        text_lengths: Tensor | None = None,
        text: TextContext | None = None,
        modulation: Modulation | None = None,
        rope: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Network output, to be read by the family's convention.

        Args:
            latents: [R, C, T, H, W].
            timestep: [R], or [R, T]: one a latent frame (for a patch of one frame).
            encoder_hidden_states: [R, L, c]; needed unless `text` is given.
            fps: see `prepare_shared`.
            condition_mask: [R or 1, 1, T, H or 1, W or 1], 1 on given latent frames; needed where the model reads it.
            padding_mask: [R or 1, 1, h, w] of any size, 1 on padded pixels; None: nothing is padded.
            text_lengths: see `prepare_conditioning`.
            text, modulation, rope, positions: what the `prepare_*` methods return, to spare computing them again.

        Returns:
            [R, C, T, H, W] in the dtype of `latents`.

        Raises:
            InputError: text is missing, or a condition mask is given or missing against the configuration.
        """
        grid = self._grid(latents.shape)
        if rope is None:
            rope = self._rope(grid, fps)
        if positions is None and self.learnable_pos_embed is not None:
            positions = self.learnable_pos_embed(grid)
        if modulation is None:
            [modulation] = self._modulation([timestep if timestep.ndim == 2 else timestep.unsqueeze(1)])
        if text is None:
            if encoder_hidden_states is None:
                raise InputError("the Cosmos transformer needs encoder_hidden_states or prepared text")
            text = self.prepare_conditioning(encoder_hidden_states=encoder_hidden_states, text_lengths=text_lengths)[
                "text"
            ]

        dtype = self.proj_out.weight.dtype
        x = self.patch_embed(self._with_masks(latents.to(dtype), condition_mask, padding_mask))  # [R, T', H', W', d]
        groups = modulation.out.shape[1]
        x = x.flatten(1, 3).unflatten(1, (groups, -1))  # [R, F, M, d]
        if positions is not None:
            positions = positions.to(x.dtype)  # [N, d]
        tables = modulation.blocks.unbind(2)
        calls = [
            BlockCall(block, {"keys": k, "values": v, "key_bias": text.key_bias, "modulation": table},
                      {"rope": rope, "positions": positions, "grid": grid}, TOKENS)
            for block, k, v, table in zip(self.transformer_blocks, text.keys, text.values, tables, strict=True)
        ]  # fmt: skip
        x = run_blocks(x, calls)  # [R, F, M, d]
        shift, scale = modulation.out.unsqueeze(3).unbind(2)  # [R, F, 1, d] each
        x = self.proj_out(self.norm_out(x, shift, scale))  # [R, F, M, ph pw pt C]
        return self._unpatchify(x, grid).to(latents.dtype)

    def _blocks(self) -> list[CosmosTransformerBlock]:
        return [block for block in self.transformer_blocks if isinstance(block, CosmosTransformerBlock)]

    def _modulation(self, timesteps: Sequence[Tensor]) -> list[Modulation]:
        """Return the tables of all blocks for each timestep [R, F]; each block is called once for all of them."""
        embeddings = [self.time_embed(t) for t in timesteps]  # [R, F, d], [R, F, 3 d] each
        by_block = [block.modulation(embeddings) for block in self._blocks()]
        made: list[Modulation] = []
        for embedding, *blocks in zip(embeddings, *by_block, strict=True):
            table, out = torch.stack(blocks, dim=2), self.norm_out.modulation(*embedding)
            made.append(Modulation(table + unit_scales(3, table), out + unit_scales(2, out)))
        return made

    def _with_masks(self, x: Tensor, condition_mask: Tensor | None, padding_mask: Tensor | None) -> Tensor:
        """[R, C, T, H, W] -> [R, C', T, H, W]: what the patch embedding reads"""
        rows, _, *size = x.shape
        parts = [x]
        if self.config.reads_condition_mask is not (condition_mask is not None):
            verb = "needs a" if condition_mask is None else "takes no"
            raise InputError(f"a Cosmos transformer with in_channels={self.config.in_channels} {verb} condition_mask")
        if condition_mask is not None:
            parts.append(condition_mask.to(x.dtype).expand(rows, 1, *size))
        if self.config.concat_padding_mask:
            if padding_mask is None:
                parts.append(x.new_zeros(1).expand(rows, 1, *size))
            else:
                resized = F.interpolate(padding_mask.to(x.dtype), size=size[1:], mode="nearest")
                parts.append(resized.unsqueeze(2).expand(rows, 1, *size))
        return torch.cat(parts, dim=1)

    def _grid(self, latent_shape: Sequence[int]) -> tuple[int, int, int]:
        """[..., T, H, W] -> tokens (T', H', W')"""
        return token_grid(latent_shape, self.config.patch_size, self.config.max_tokens)

    def _rope(self, grid: tuple[int, int, int], fps: float | None) -> Tensor:
        """(T', H', W') -> complex64 [N, D/2]"""
        if fps is not None and not fps > 0:
            raise InputError(f"fps={fps} should be positive")
        positions = [torch.arange(n, dtype=torch.float32, device=self.proj_out.weight.device) for n in grid]
        if fps is not None:
            positions[0] = positions[0] / fps * BASE_FPS
        dims = split_rope_dims(self.config.attention_head_dim)
        scales = zip(dims, self.config.rope_scale, strict=True)
        return halves_rope_table(positions, dims, [ROPE_THETA * scale ** (dim / (dim - 2)) for dim, scale in scales])

    def _unpatchify(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[R, F, M, ph pw pt C] -> [R, C, T, H, W]"""
        pt, ph, pw = self.config.patch_size
        x = x.reshape(x.shape[0], *grid, ph, pw, pt, -1)
        x = x.permute(0, 7, 1, 6, 2, 4, 3, 5)  # [R, C, T', pt, H', ph, W', pw]
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
