"""The LTX-Video transformer (arXiv 2501.00103), parameter names as in the published diffusers checkpoints.

R rows, F modulation groups of M tokens each (F = 1: one timestep a row), N = F M tokens (one a latent position), d
width, H heads of D channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kinetoscope.attention import attention
from kinetoscope.core.errors import InputError
from kinetoscope.models.ltx.config import LTXConfig
from kinetoscope.nn.embeddings import TextProjection, TimestepEmbedding, sinusoidal_embedding
from kinetoscope.nn.feed_forward import FeedForward
from kinetoscope.nn.linear import Linear
from kinetoscope.nn.norm import ModulatedNorm, RMSNorm
from kinetoscope.nn.rope import apply_rope
from kinetoscope.nn.split import TokenAxes
from kinetoscope.nn.stack import BlockCall, run_blocks

BASE_SIZE = (20.0, 2048.0, 2048.0)
"""Time in seconds, height and width in pixels that the rotary positions 0 to 1 span."""
TEXT_MULTIPLE = 32
"""Text tokens kept come in this multiple; softmax over fewer is 8 times slower on a CPU."""
FREQUENCIES = 256
"""Width of the sinusoidal timestep embedding."""
QK_EPS = 1e-5
TOKENS = TokenAxes(each={"rope": 0}, groups={"projected": 1})
"""Which arguments of a block go with its tokens."""


class TextContext(NamedTuple):
    """What cross-attention needs of the text, one entry a block; rows first."""

    keys: list[Tensor]  # [R, L, H, D] each
    values: list[Tensor]  # [R, L, H, D] each
    key_bias: Tensor | None  # [R, L] float32, -inf beyond the true length; None: all tokens count


class Modulation(NamedTuple):
    """What the timestep gives, before the tables of the blocks are added."""

    projected: Tensor  # [R or 1, F, 6, d]
    embedded: Tensor  # [R or 1, F, d]


class WideRotation(nn.Module):
    """Rotation of all heads as one; a module, so that a device with some of the heads can be given their part."""

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """x [R, N, d], rope [N, d/2] -> [R, N, d]"""
        return apply_rope(x.unsqueeze(2), rope).squeeze(2)


class Attention(nn.Module):
    """Attention with an RMS norm over all heads; rotary positions run over the whole width, not each head's."""

    def __init__(self, config: LTXConfig, role: str) -> None:
        super().__init__()
        dim, bias = config.dim, config.attention_bias
        self.head_dim = config.attention_head_dim
        self.role = role
        self.norm_q = RMSNorm(dim, QK_EPS)
        self.norm_k = RMSNorm(dim, QK_EPS)
        self.to_q = Linear(dim, dim, bias=bias)
        self.to_k = Linear(dim, dim, bias=bias)
        self.to_v = Linear(dim, dim, bias=bias)
        self.to_out = nn.Sequential(Linear(dim, dim, bias=config.attention_out_bias))
        self.rotate = WideRotation()

    def project(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values without positions: [R, L, d] -> two of [R, L, H, D]"""
        heads = (-1, self.head_dim)
        return self.norm_k(self.to_k(text)).unflatten(-1, heads), self.to_v(text).unflatten(-1, heads)

    def over_video(self, x: Tensor, rope: Tensor, grid: tuple[int, int, int] | None = None) -> Tensor:
        """Self-attention: [R, N, d] -> [R, N, d]"""
        heads = (-1, self.head_dim)
        q, k = self.rotate(self.norm_q(self.to_q(x)), rope), self.rotate(self.norm_k(self.to_k(x)), rope)
        q, k, v = (t.unflatten(-1, heads) for t in (q, k, self.to_v(x)))
        out = attention(q, k, v, role=self.role, grid=grid)
        return self.to_out(out.flatten(2))

    def over_text(self, x: Tensor, keys: Tensor, values: Tensor, key_bias: Tensor | None) -> Tensor:
        """Cross-attention: [R, N, d] -> [R, N, d]"""
        q = self.norm_q(self.to_q(x)).unflatten(-1, (-1, self.head_dim))
        return self.to_out(attention(q, keys, values, role=self.role, key_bias=key_bias).flatten(2))


class LTXVideoTransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each on a residual; the text sees no norm and no modulation."""

    def __init__(self, config: LTXConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.dim, config.norm_eps, elementwise_affine=False)
        self.attn1 = Attention(config, "self")
        self.norm2 = RMSNorm(config.dim, config.norm_eps, elementwise_affine=False)
        self.attn2 = Attention(config, "cross")
        self.ff = FeedForward(config.dim, 4 * config.dim)
        self.scale_shift_table = nn.Parameter(torch.zeros(6, config.dim))

    def forward(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        key_bias: Tensor | None,
        projected: Tensor,
        rope: Tensor,
        grid: tuple[int, int, int] | None = None,
    ) -> Tensor:
        """x [R, N, d], projected [R or 1, F, 6, d] -> [R, N, d]"""
        table = self.scale_shift_table.float() + projected.float()  # [R, F, 6, d]
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = table.unsqueeze(3).unbind(2)  # [R, F, 1, d] each
        x = gated_add(x, self.attn1.over_video(modulate(self.norm1(x), shift_a, scale_a), rope, grid), gate_a)
        x = x + self.attn2.over_text(x, keys, values, key_bias)
        return gated_add(x, self.ff(modulate(self.norm2(x), shift_f, scale_f)), gate_f)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift in float32, x [R, N, d] in its F groups; result in the dtype of x."""
    groups = x.float().unflatten(1, (scale.shape[1], -1))  # [R, F, M, d]
    return torch.addcmul(shift, groups, 1 + scale).flatten(1, 2).to(x.dtype)


def gated_add(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + y gate in float32, [R, N, d] in F groups; result in the dtype of x."""
    groups = (gate.shape[1], -1)
    out = torch.addcmul(x.float().unflatten(1, groups), y.float().unflatten(1, groups), gate)
    return out.flatten(1, 2).to(x.dtype)


class TimestepEmbedder(nn.Module):
    """A level of the published names: `time_embed.emb.timestep_embedder`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(FREQUENCIES, dim)


class TimeEmbed(nn.Module):
    """Embedding of the timestep and its six-way projection."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.emb = TimestepEmbedder(dim)
        self.linear = Linear(dim, 6 * dim)

    def modulation(self, timestep: Tensor) -> Modulation:
        """[R, F] -> projection [R, F, 6, d] and embedding [R, F, d]"""
        embedded = self.emb.timestep_embedder(sinusoidal_embedding(timestep, FREQUENCIES))
        return Modulation(self.linear(nn.functional.silu(embedded)).unflatten(-1, (6, -1)), embedded)


class LTXVideoTransformer3DModel(nn.Module):
    """LTX-Video transformer: text- and image-to-video differ only in the timesteps of the first frame's tokens.

    Built on the meta device it has exactly the names and shapes of a published checkpoint.

    Args:
        config: published sizes.
    """

    keep_in_float32 = ("scale_shift_table",)

    def __init__(self, config: LTXConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.proj_in = Linear(config.in_channels, config.dim)
        self.scale_shift_table = nn.Parameter(torch.zeros(2, config.dim))
        self.time_embed = TimeEmbed(config.dim)
        self.caption_projection = TextProjection(config.caption_channels, config.dim)
        self.transformer_blocks = nn.ModuleList(LTXVideoTransformerBlock(config) for _ in range(config.num_layers))
        self.norm_out = ModulatedNorm(config.dim, 1e-6)
        self.proj_out = Linear(config.dim, config.out_channels or config.in_channels)

    def prepare_conditioning(
        self, *, encoder_hidden_states: Tensor, text_lengths: Tensor | None = None
    ) -> dict[str, TextContext]:
        """Keys and values of the text for all blocks, once a run.

        Args:
            encoder_hidden_states: [R, L, caption_channels].
            text_lengths: [R] true lengths; tokens beyond are not attended to. None: all L tokens are.

        Raises:
            InputError: a length is not in [1, L].
        """
        key_bias = None
        if text_lengths is not None:
            total = encoder_hidden_states.shape[1]
            shortest, longest = int(text_lengths.min()), int(text_lengths.max())
            if shortest < 1 or longest > total:
                raise InputError(f"text_lengths must be in [1, {total}], the text given; got {text_lengths.tolist()}")
            kept = min(total, -(-longest // TEXT_MULTIPLE) * TEXT_MULTIPLE)
            encoder_hidden_states = encoder_hidden_states[:, :kept]
            if shortest < kept:
                device = encoder_hidden_states.device
                beyond = torch.arange(kept, device=device) >= text_lengths.to(device).unsqueeze(1)  # [R, L]
                key_bias = torch.zeros(beyond.shape, device=device).masked_fill_(beyond, -math.inf)
        text = self.caption_projection(encoder_hidden_states.to(self.caption_projection.linear_1.weight.dtype))
        pairs = [block.attn2.project(text) for block in self.blocks]
        return {"text": TextContext([k for k, _ in pairs], [v for _, v in pairs], key_bias)}

    def prepare_timesteps(self, timesteps: Tensor) -> dict[str, Modulation]:
        """Modulation of each of S steps, once a run: [S], or [S, F] for one timestep a latent frame.

        Each is computed alone, so a step has the same bits as a forward of one row that was given its timestep.
        """
        steps = [self.time_embed.modulation(t.view(1, -1)) for t in timesteps]
        return {
            "modulation": Modulation(torch.cat([s.projected for s in steps]), torch.cat([s.embedded for s in steps]))
        }

    def prepare_shared(
        self, latent_shape: Sequence[int], *, rope_interpolation_scale: Sequence[float] = (1.0, 1.0, 1.0)
    ) -> dict[str, Tensor]:
        """Rotary table of a latent shape [..., T, H, W], once a run.

        Args:
            latent_shape: of the latents.
            rope_interpolation_scale: what one latent position spans: seconds, pixels high, pixels wide.
        """
        return {"rope": self._rope(latent_shape, rope_interpolation_scale)}

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *,
        text_lengths: Tensor | None = None,
        rope_interpolation_scale: Sequence[float] = (1.0, 1.0, 1.0),
        text: TextContext | None = None,
        modulation: Modulation | None = None,
        rope: Tensor | None = None,
    ) -> Tensor:
        """Predicted flow velocity.

        Args:
            latents: [R, C, T, H, W].
            timestep: [R] in [0, 1000], or [R, T]: one for each latent frame.
            encoder_hidden_states: [R, L, caption_channels]; needed unless `text` is given.
            text_lengths: see `prepare_conditioning`.
            rope_interpolation_scale: see `prepare_shared`.
            text, modulation, rope: what the `prepare_*` methods return, to spare computing them again.

        Returns:
            [R, C, T, H, W] in the dtype of `latents`.
        """
        if rope is None:
            rope = self._rope(latents.shape, rope_interpolation_scale)
        if modulation is None:
            modulation = self.time_embed.modulation(timestep if timestep.ndim == 2 else timestep.unsqueeze(1))
        if text is None:
            if encoder_hidden_states is None:
                raise InputError("the LTX transformer needs encoder_hidden_states or prepared text")
            text = self.prepare_conditioning(encoder_hidden_states=encoder_hidden_states, text_lengths=text_lengths)[
                "text"
            ]

        frames, height, width = grid = latents.shape[2:]
        x = self.proj_in(latents.flatten(2).transpose(1, 2).to(self.proj_in.weight.dtype))  # [R, N, d]
        calls = [
            BlockCall(block, {"keys": k, "values": v, "key_bias": text.key_bias, "projected": modulation.projected},
                      {"rope": rope, "grid": (frames, height, width)}, TOKENS)
            for block, k, v in zip(self.blocks, text.keys, text.values, strict=True)
        ]  # fmt: skip
        x = run_blocks(x, calls)  # [R, N, d]
        table = self.scale_shift_table.float() + modulation.embedded.float().unsqueeze(2)  # [R, F, 2, d]
        shift, scale = table.unsqueeze(3).unbind(2)  # [R, F, 1, d] each
        x = self.norm_out(x.unflatten(1, (table.shape[1], -1)), shift, 1 + scale)  # [R, F, M, d]
        x = self.proj_out(x.flatten(1, 2))  # [R, N, C]
        return x.transpose(1, 2).unflatten(2, grid).to(latents.dtype)

    @property
    def blocks(self) -> list[LTXVideoTransformerBlock]:
        """The blocks under the name that compilation and offloading look for."""
        return [block for block in self.transformer_blocks if isinstance(block, LTXVideoTransformerBlock)]

    def _rope(self, latent_shape: Sequence[int], scale: Sequence[float]) -> Tensor:
        """[..., T, H, W] -> complex64 [N, d/2]

        Angles reach 10^4 radians, where float32 is good to 10^-3 only; the published model computes them in float32 in
        this order, so the order is part of what it learned.
        """
        device = self.proj_out.weight.device
        axes = [torch.arange(n, dtype=torch.float32, device=device) for n in latent_shape[-3:]]
        axes = [axis * s / base for axis, s, base in zip(axes, scale, BASE_SIZE, strict=True)]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)  # [N, 3]
        count = self.config.dim // 6
        frequencies = 10000.0 ** torch.linspace(0.0, 1.0, count, dtype=torch.float32, device=device) * math.pi / 2
        angles = (frequencies * (grid.unsqueeze(-1) * 2 - 1)).transpose(1, 2).flatten(1)  # [N, 3 (d // 6)]
        still = angles.new_zeros(len(angles), self.config.dim // 2 - angles.shape[1])  # the first pairs do not turn
        angles = torch.cat([still, angles], dim=1)
        return torch.complex(angles.cos(), angles.sin())
