"""Layers of double-stream transformers (MMDiT, arXiv 2403.03206; HunyuanVideo, arXiv 2412.03603), with the parameter
names of the published checkpoints.

Video and text are two sequences with weights of their own that meet in one attention. R rows, N video tokens, L text
tokens, d width, H heads of D channels. Modulation comes in G groups: one for all tokens, or two, the first of which is
for the `first` leading tokens of the sequence (a clean first frame).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kinetoscope.core.context import AttentionFn
from kinetoscope.core.errors import InputError
from kinetoscope.nn.embeddings import TimestepEmbedding, sinusoidal_embedding
from kinetoscope.nn.feed_forward import FeedForward
from kinetoscope.nn.linear import Linear
from kinetoscope.nn.norm import FP32LayerNorm, ModulatedNorm, RMSNorm
from kinetoscope.nn.rope import apply_rope

EPS = 1e-6
FREQ_DIM = 256


class ModulationLayer(nn.Module):
    """One linear layer that gives `entries` vectors of width d from an embedding that has gone through SiLU."""

    def __init__(self, dim: int, entries: int) -> None:
        super().__init__()
        self.entries = entries
        self.linear = Linear(dim, entries * dim)

    def forward(self, emb: Tensor) -> tuple[Tensor, ...]:
        """[R, G, d] -> entries times [R, G, d] float32"""
        return self.linear(emb).float().chunk(self.entries, dim=-1)


def modulate(norm: ModulatedNorm, x: Tensor, shift: Tensor, scale: Tensor, first: int = 0) -> Tensor:
    """norm(x) (1 + scale) + shift: x [R, N, d], shift and scale [R, G, d] float32 -> like x"""
    scale = 1 + scale
    if scale.shape[1] == 1:
        return norm(x, shift, scale)
    parts = zip(x.tensor_split((first,), dim=1), shift.split(1, dim=1), scale.split(1, dim=1), strict=True)
    return torch.cat([norm(*part) for part in parts], dim=1)


def gated_add(x: Tensor, y: Tensor, gate: Tensor, first: int = 0) -> Tensor:
    """x + y gate in float32: x, y [R, N, d], gate [R, G, d] float32 -> like x"""
    if gate.shape[1] > 1:
        head, rest = gate.split(1, dim=1)
        count = x.shape[1]
        gate = torch.cat([head.expand(-1, first, -1), rest.expand(-1, count - first, -1)], dim=1)
    return torch.addcmul(x.float(), y.float(), gate).to(x.dtype)


class JointAttention(nn.Module):
    """Attention over video and text together; RMS norm of every head's queries and keys; rotary positions for video.

    Args:
        dim, head_dim: d and D.
        attend: `attention.attention` (the caller gives it, since layers know no backends).
    """

    def __init__(self, dim: int, head_dim: int, attend: AttentionFn) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.attend = attend
        self.to_q = Linear(dim, dim)
        self.to_k = Linear(dim, dim)
        self.to_v = Linear(dim, dim)
        self.add_q_proj = Linear(dim, dim)
        self.add_k_proj = Linear(dim, dim)
        self.add_v_proj = Linear(dim, dim)
        self.norm_q = RMSNorm(head_dim, EPS)
        self.norm_k = RMSNorm(head_dim, EPS)
        self.norm_added_q = RMSNorm(head_dim, EPS)
        self.norm_added_k = RMSNorm(head_dim, EPS)
        self.to_out = nn.Sequential(Linear(dim, dim))
        self.to_add_out = Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        rope: Tensor,
        key_bias: Tensor | None,
        grid: tuple[int, int, int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x [R, N, d] of a video's `grid`, text [R, L, d], rope [N, D/2], key_bias [R, N + L] -> like x, like text"""
        heads = (-1, self.head_dim)
        q = apply_rope(self.norm_q(self.to_q(x).unflatten(-1, heads)), rope)  # [R, N, H, D]
        k = apply_rope(self.norm_k(self.to_k(x).unflatten(-1, heads)), rope)
        v = self.to_v(x).unflatten(-1, heads)
        text_q = self.norm_added_q(self.add_q_proj(text).unflatten(-1, heads))  # [R, L, H, D]
        text_k = self.norm_added_k(self.add_k_proj(text).unflatten(-1, heads))
        text_v = self.add_v_proj(text).unflatten(-1, heads)
        out = self.attend(
            torch.cat([q, text_q], dim=1),
            torch.cat([k, text_k], dim=1),
            torch.cat([v, text_v], dim=1),
            role="joint",
            key_bias=key_bias,
            grid=grid,
        ).flatten(2)  # [R, N + L, d]
        video, words = out.split((x.shape[1], text.shape[1]), dim=1)
        return self.to_out(video), self.to_add_out(words)


class DualStreamBlock(nn.Module):
    """Joint attention, then a feed-forward layer for each stream, all modulated and gated by the embedding."""

    def __init__(self, dim: int, head_dim: int, mlp_ratio: float, attend: AttentionFn) -> None:
        super().__init__()
        self.modulated = ModulatedNorm(dim, EPS)
        self.norm1 = ModulationLayer(dim, 6)
        self.norm1_context = ModulationLayer(dim, 6)
        self.attn = JointAttention(dim, head_dim, attend)
        self.ff = FeedForward(dim, int(dim * mlp_ratio))
        self.ff_context = FeedForward(dim, int(dim * mlp_ratio))

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        emb: Tensor,
        rope: Tensor,
        key_bias: Tensor | None,
        first: int = 0,
        grid: tuple[int, int, int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x [R, N, d], text [R, L, d], emb [R, G, d] (after SiLU), rope [N, D/2] -> like x, like text"""
        norm = self.modulated
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.norm1(emb)  # [R, G, d] each
        t_shift_a, t_scale_a, t_gate_a, t_shift_f, t_scale_f, t_gate_f = self.norm1_context(emb[:, -1:])
        normed, normed_text = modulate(norm, x, shift_a, scale_a, first), modulate(norm, text, t_shift_a, t_scale_a)
        y, y_text = self.attn(normed, normed_text, rope, key_bias, grid)
        x = gated_add(x, y, gate_a, first)
        text = gated_add(text, y_text, t_gate_a)
        x = gated_add(x, self.ff(modulate(norm, x, shift_f, scale_f, first)), gate_f, first)
        text = gated_add(text, self.ff_context(modulate(norm, text, t_shift_f, t_scale_f)), t_gate_f)
        return x, text


class ModulatedOutput(nn.Module):
    """The last norm: its scale comes before its shift."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.modulated = ModulatedNorm(dim, EPS)
        self.linear = Linear(dim, 2 * dim)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [R, N, d], emb [R, 1, d] (after SiLU) -> like x"""
        scale, shift = self.linear(emb).float().chunk(2, dim=-1)
        return modulate(self.modulated, x, shift, scale)


class PatchEmbedding(nn.Module):
    """Video to tokens, and the shapes that go with it.

    Args:
        in_channels: of the video's latents.
        dim: d.
        patch: latent frames, rows and columns of a token.
    """

    def __init__(self, in_channels: int, dim: int, patch: tuple[int, int, int]) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv3d(in_channels, dim, kernel_size=patch, stride=patch)

    def forward(self, latents: Tensor) -> tuple[Tensor, Sequence[int]]:
        """[R, C, T, H, W] -> tokens [R, N, d] in the dtype of the weights, and their grid (T', H', W')"""
        dtype = self.proj.weight.dtype
        x = self.proj(latents.to(dtype)).to(dtype)  # [R, d, T', H', W']
        return x.flatten(2).transpose(1, 2).contiguous(), x.shape[2:]

    def undo(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Projected tokens [R, N, C pt ph pw] -> [R, C, T, H, W]"""
        x = x.reshape(x.shape[0], *grid, -1, *self.patch)
        x = x.permute(0, 4, 1, 5, 2, 6, 3, 7)  # [R, C, T', pt, H', ph, W', pw]
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def positions(self, latent_shape: Sequence[int]) -> list[Tensor]:
        """Positions of the tokens of [..., T, H, W] along each axis.

        Raises:
            InputError: a size is not a multiple of the patch.
        """
        for axis, size, patch in zip("THW", latent_shape[-3:], self.patch, strict=True):
            if size % patch or size < 1:
                raise InputError(f"latent {axis}={size} must be a multiple of the patch size {patch}, at least 1")
        sizes = zip(latent_shape[-3:], self.patch, strict=True)
        return [torch.arange(size // patch, device=self.proj.weight.device) for size, patch in sizes]


# -- the token refiner: a small transformer over the text, modulated by time and the mean of the text ----------------


class MaskedText(NamedTuple):
    """Text as the refiner takes it; rows first.

    Attributes:
        tokens: [R, L, d] projected; L is the longest text of the rows.
        pooled: [R, d] embedding of each row's mean token.
        key_bias: [R, L] float32, minus infinity beyond a row's length; None where all rows have the same length.
    """

    tokens: Tensor
    pooled: Tensor
    key_bias: Tensor | None


class RefinerAttention(nn.Module):
    """Attention of the text to itself."""

    def __init__(self, dim: int, head_dim: int, attend: AttentionFn) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.attend = attend
        self.to_q = Linear(dim, dim)
        self.to_k = Linear(dim, dim)
        self.to_v = Linear(dim, dim)
        self.to_out = nn.Sequential(Linear(dim, dim))

    def forward(self, x: Tensor, key_bias: Tensor | None) -> Tensor:
        """[R, L, d] -> [R, L, d]"""
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.to_q, self.to_k, self.to_v))
        return self.to_out(self.attend(q, k, v, role="refiner", key_bias=key_bias).flatten(2))


class SiLUFeedForward(nn.Module):
    """Linear, SiLU, linear, with the indices of a published feed-forward layer."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        first = nn.Module()
        first.proj = Linear(dim, hidden_dim)
        self.net = nn.ModuleList([first, nn.Identity(), Linear(hidden_dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]"""
        first, _, last = self.net
        return last(F.silu(first.proj(x)))  # pyright: ignore[reportCallIssue]


class RefinerBlock(nn.Module):
    """Attention and feed-forward, each on a gated residual."""

    def __init__(self, dim: int, head_dim: int, attend: AttentionFn) -> None:
        super().__init__()
        self.norm1 = FP32LayerNorm(dim, EPS)
        self.attn = RefinerAttention(dim, head_dim, attend)
        self.norm2 = FP32LayerNorm(dim, EPS)
        self.ff = SiLUFeedForward(dim, 4 * dim)
        self.norm_out = ModulationLayer(dim, 2)

    def forward(self, x: Tensor, emb: Tensor, key_bias: Tensor | None) -> Tensor:
        """x [R, L, d], emb [R, 1, d] (after SiLU) -> [R, L, d]"""
        gate_a, gate_f = self.norm_out(emb)
        x = gated_add(x, self.attn(self.norm1(x), key_bias), gate_a)
        return gated_add(x, self.ff(self.norm2(x)), gate_f)


class TimeTextEmbedding(nn.Module):
    """Embeddings of a timestep and of a pooled vector, which the caller adds."""

    def __init__(self, dim: int, pooled_dim: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(FREQ_DIM, dim)
        self.text_embedder = TimestepEmbedding(pooled_dim, dim)

    def embed_time(self, timestep: Tensor) -> Tensor:
        """[R] -> [R, d]"""
        return self.timestep_embedder(sinusoidal_embedding(timestep, FREQ_DIM))


class RefinerBlocks(nn.Module):
    """The published level of names around the blocks."""

    def __init__(self, dim: int, head_dim: int, layers: int, attend: AttentionFn) -> None:
        super().__init__()
        self.refiner_blocks = nn.ModuleList(RefinerBlock(dim, head_dim, attend) for _ in range(layers))


class TokenRefiner(nn.Module):
    """Text of a language model to tokens of the transformer.

    Args:
        in_dim: width of the language model.
        dim, head_dim: d and D.
        layers: number of blocks.
        attend: see `JointAttention`.
    """

    def __init__(self, in_dim: int, dim: int, head_dim: int, layers: int, attend: AttentionFn) -> None:
        super().__init__()
        self.time_text_embed = TimeTextEmbedding(dim, in_dim)
        self.proj_in = Linear(in_dim, dim)
        self.token_refiner = RefinerBlocks(dim, head_dim, layers, attend)

    def prepare(self, text: Tensor, lengths: Tensor | None) -> MaskedText:
        """What depends on the text alone: [R, L, in_dim], true lengths [R] or None for all L."""
        text, key_bias = trim_text(text.to(self.proj_in.weight.dtype), lengths)
        if key_bias is None:
            mean = text.float().mean(dim=1)
        else:
            kept = (key_bias == 0).unsqueeze(-1)  # [R, L, 1]
            mean = (text.float() * kept).sum(dim=1) / kept.sum(dim=1)
        return MaskedText(self.proj_in(text), self.time_text_embed.text_embedder(mean), key_bias)

    def forward(self, text: MaskedText, time: Tensor) -> Tensor:
        """text of R rows, time [R or 1, d] from `time_text_embed.embed_time` -> [R, L, d]"""
        emb = F.silu(time + text.pooled).unsqueeze(1)  # [R, 1, d]
        x = text.tokens
        for block in self.token_refiner.refiner_blocks:
            x = block(x, emb, text.key_bias)
        return x


def trim_text(text: Tensor, lengths: Tensor | None, shortest: int = 1) -> tuple[Tensor, Tensor | None]:
    """Text [R, L, D] cut to the longest of `lengths` [R], and the key bias that hides what is beyond a row's own.

    Raises:
        InputError: a length is not in [shortest, L].
    """
    if lengths is None:
        return text, None
    low, longest = int(lengths.min()), int(lengths.max())
    if low < shortest or longest > text.shape[1]:
        raise InputError(
            f"text_lengths must be in [{shortest}, {text.shape[1]}], the text given; got {lengths.tolist()}"
        )
    text = text[:, :longest]
    if low == longest:
        return text, None
    position = torch.arange(longest, device=text.device)
    beyond = position >= lengths.to(text.device).unsqueeze(1)
    return text, torch.zeros(beyond.shape, device=text.device).masked_fill(beyond, -torch.inf)


def join_biases(biases: Sequence[Tensor | None], counts: Sequence[int]) -> Tensor | None:
    """Key biases [R, n] of groups of `counts` tokens side by side; None, everywhere or for a group, hides nothing."""
    given = next((b for b in biases if b is not None), None)
    if given is None:
        return None
    parts = zip(biases, counts, strict=True)
    return torch.cat([given.new_zeros(len(given), n) if b is None else b for b, n in parts], dim=1)
