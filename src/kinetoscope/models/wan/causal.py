"""The causal Wan transformer (self-forcing, arXiv 2506.08009): Wan whose frames see only blocks up to their own.

Parameters are Wan's. Self-attention alone differs: over a whole video it is block-causal, and block by block it reads
keys and values of earlier blocks from a cache that the caller owns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from kinetoscope.attention import attention
from kinetoscope.core.context import current_share
from kinetoscope.core.errors import ConfigError, InputError
from kinetoscope.models.wan.config import WanConfig
from kinetoscope.models.wan.transformer import TOKENS, SelfAttention, WanTransformer3DModel
from kinetoscope.nn.block_causal import BlockRows, in_tokens, join_times, rows_of_forward
from kinetoscope.nn.ring_cache import RingCache, remember
from kinetoscope.nn.split import TokenAxes


@dataclass(frozen=True, slots=True)
class CausalWanConfig(WanConfig):
    """Sizes of a causal Wan transformer, named as in the published file.

    Attributes:
        num_frames_per_block: latent frames made together.
        local_attn_size: latent frames a block attends to, its own and the sink included; -1: all.
        sink_size: first latent frames that every block attends to.
        sliding_window_num_frames: the longest video, in latent frames, where `local_attn_size` is -1.
        independent_first_frame: the first latent frame is a block of its own.
        text_len: text tokens it was trained with, padding included.
        rope_cache_policy: how cached keys are rotated; only "absolute" positions exist here.
    """

    num_frames_per_block: int = 3
    local_attn_size: int = -1
    sink_size: int = 0
    sliding_window_num_frames: int = 21
    independent_first_frame: bool = False
    text_len: int = 512
    rope_cache_policy: str = "absolute"

    def check(self) -> None:
        """Raise ConfigError where the values do not describe a model that `CausalWanTransformer3DModel` builds."""
        WanConfig(**{f.name: getattr(self, f.name) for f in fields(WanConfig)}).check()
        if self.patch_size[0] != 1:
            raise ConfigError(f"causal Wan: patch_size={self.patch_size}; a token may not span several latent frames")
        if self.num_frames_per_block < 1 or self.sliding_window_num_frames < self.num_frames_per_block:
            raise ConfigError(
                f"causal Wan: num_frames_per_block={self.num_frames_per_block} must be positive and at most "
                f"sliding_window_num_frames={self.sliding_window_num_frames}"
            )
        if self.rope_cache_policy != "absolute":
            raise ConfigError(f"causal Wan: rope_cache_policy={self.rope_cache_policy!r}; only 'absolute' is supported")
        if self.add_ref_conv or self.add_control_adapter:
            raise ConfigError("causal Wan: add_ref_conv and add_control_adapter are of models that see the whole video")
        check_window(self.local_attn_size, self.sink_size, self.num_frames_per_block)


def check_window(window: int, sink: int, block: int) -> None:
    """Raise ConfigError unless a window (-1: no bound) has room for a sink and a block."""
    if sink < 0 or (window != -1 and window < sink + block):
        raise ConfigError(
            f"causal Wan: local_attn_size={window} must be -1, or have room for sink_size={sink} and a block of {block}"
        )


class Place(NamedTuple):
    """Where the tokens of a forward are, and what they may attend to.

    Attributes:
        table: rotations of the tokens, complex64 [N, D/2].
        rows: which tokens attend to which; None: all to all.
        cache: keys and values of earlier frames.
        start: first frame of the tokens, for the cache.
    """

    table: Tensor
    rows: tuple[BlockRows, ...] | None = None
    cache: RingCache | None = None
    start: int = 0


class CausalSelfAttention(SelfAttention):
    """Self-attention that sees the past.

    Args:
        dim, head_dim, eps: as in Wan.
        layer: which of the cache's layers is its own.
    """

    def __init__(self, dim: int, head_dim: int, eps: float, layer: int) -> None:
        super().__init__(dim, head_dim, eps)
        self.layer = layer

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, rope: Place | Tensor, grid: Any = None, gate: Any = None
    ) -> Tensor:
        """[R, F, M, d] -> [R, F, M, d]; dense, since blocks of a video come with the past between them."""
        place = rope if isinstance(rope, Place) else Place(rope)
        q, k, v = self.project(x, place.table)  # [R, N, H, D] each
        memory: Any = None if place.cache is None else partial(remember, self, place, grid)
        if memory is not None and current_share() is None:  # here rather than there: a compiled block breaks once less
            (k, v), memory = memory(k, v), None  # [R, N', H, D]
        out = attention(q, k, v, role="self", rows=place.rows, memory=memory)
        return self.to_out(out.reshape(*x.shape[:-1], -1))


class CausalWanTransformer3DModel(WanTransformer3DModel):
    """Wan with block-causal self-attention.

    Args:
        config: published sizes.
    """

    config: CausalWanConfig
    token_axes: ClassVar[TokenAxes] = replace(TOKENS, each={"rope.table": 0})

    def __init__(self, config: CausalWanConfig) -> None:
        super().__init__(config)
        for layer, block in enumerate(self._blocks()):
            block.attn1 = CausalSelfAttention(config.dim, config.attention_head_dim, config.eps, layer)

    def new_cache(
        self,
        rows: int,
        latent_shape: Sequence[int],
        frames: int | None = None,
        *,
        window: int | None = None,
        sink: int | None = None,
        dtype: torch.dtype | None = None,
        devices: int = 1,
    ) -> RingCache:
        """Memory for a video or a stream.

        Args:
            rows: R.
            latent_shape: [..., H, W] of the latents.
            frames: latent frames of the whole video; None: a stream.
            window, sink: in place of the configured `local_attn_size` and `sink_size`.
            dtype: of keys and values; None: that of the weights.
            devices: that share the heads in attention (Ulysses), each of which remembers its own.

        Raises:
            InputError: a video longer than an unbounded window may be; a size that is not a multiple of the patch.
            ConfigError: a window without room for the sink and a block.
        """
        config = self.config
        window = config.local_attn_size if window is None else window
        sink = config.sink_size if sink is None else sink
        check_window(window, sink, config.num_frames_per_block)
        limit = config.sliding_window_num_frames if window == -1 else window
        if window == -1 and frames is not None and frames > limit:
            raise InputError(
                f"{frames} latent frames are more than the {limit} this model was trained to see at once; "
                "set local_attn_size for a rolling window"
            )
        height, width = latent_shape[-2:]
        self._rope((1, height, width))  # refuses a size that does not divide
        tokens = (height // config.patch_size[1]) * (width // config.patch_size[2])
        head_dim = config.attention_head_dim
        heads = self._blocks()[0].attn1.to_k.out_features // head_dim  # its own, where heads are shared out
        weight = self.proj_out.weight
        size = limit if frames is None else min(limit, max(frames, sink + 1))
        return RingCache.allocate(
            config.num_layers,
            (rows, size, tokens, -(-heads // devices), head_dim),
            sink=sink,
            dtype=dtype or weight.dtype,
            device=weight.device,
        )

    def prepare_shared(self, latent_shape: Sequence[int], start_frame: int = 0) -> dict[str, Tensor]:
        """Rotary table of latent frames from `start_frame` on, of a shape [..., T, H, W]; positions are absolute.

        Raises:
            InputError: a size is not a multiple of the patch, or has more positions than the model knows.
        """
        return {"rope": self._rope(latent_shape, start_frame)}

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        latents: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *,
        blocks: Sequence[int] | None = None,
        cache: RingCache | None = None,
        start_frame: int = 0,
        clean: Tensor | None = None,
        clean_timestep: Tensor | None = None,
        rope: Tensor | None = None,
        **prepared: Any,
    ) -> Tensor:
        """Predicted flow velocity.

        Args:
            latents: [R, C, T, H, W], with a cache the next T frames (or the last ones again).
            timestep: [R] in [0, 1000], or [R, T].
            encoder_hidden_states: [R, L, text_dim]; needed unless `text` is given.
            blocks: sizes of the blocks in latent frames, T in all; None: one block.
            cache: keys and values of the frames before `start_frame`; those of `latents` are written into it.
            start_frame: place of the first frame in the video.
            clean: [R, C, T, H, W] the video without noise: block b attends to itself and to the clean blocks before it
                (teacher forcing).
            clean_timestep: [R, T] of `clean`; None: 0.
            rope, prepared: what the `prepare_*` methods return; `text_lengths` and the like as in Wan.

        Returns:
            [R, C, T, H, W] in the dtype of `latents`.

        Raises:
            InputError: see `rows_of_forward`.
        """
        frames, config = latents.shape[2], self.config
        rows = rows_of_forward(
            frames, blocks, config.local_attn_size, config.sink_size, clean=clean is not None,
            remembers=cache is not None,
        )  # fmt: skip
        if rope is None:
            rope = self._rope(latents.shape, start_frame)
        if clean is not None:
            latents, timestep = torch.cat([clean, latents], 2), join_times(clean_timestep, timestep, frames)
            rope = torch.cat([rope, rope])
        rows = in_tokens(rows, len(rope) // latents.shape[2])
        place: Any = Place(rope, rows, cache, start_frame)
        out = super().forward(latents, timestep, encoder_hidden_states, rope=place, **prepared)
        return out if clean is None else out[:, :, frames:]
