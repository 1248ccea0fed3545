"""The Matrix-Game 2 transformer (arXiv 2508.13009): Wan steered by an image and by actions, with no text.

Parameter names as in converted checkpoints (Wan's, and `action_model` as published). R rows, F latent frames of M
tokens, N = F M, d width, H heads of D channels, W pixel-frame actions that a latent frame reads.

Without memory attention is bidirectional over the frames given (the foundation model). With it the frames given are a
block: they attend to each other and to what is remembered of earlier ones. A whole video in `blocks` is attended to as
it would be block by block (training).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kinetoscope.attention import attention
from kinetoscope.core.context import current_share
from kinetoscope.core.errors import InputError
from kinetoscope.models.matrix_game.config import MatrixGameConfig
from kinetoscope.nn.action import ActionMemory, ActionModule, action_rope, action_windows, pad_actions
from kinetoscope.nn.block_causal import BlockRows, in_tokens, join_times, rows_of_forward
from kinetoscope.nn.embeddings import ImageProjection, TimestepEmbedding
from kinetoscope.nn.feed_forward import FeedForward
from kinetoscope.nn.linear import Linear
from kinetoscope.nn.norm import FP32LayerNorm, ModulatedNorm, RMSNorm, gated_add, unit_scales
from kinetoscope.nn.patches import token_grid, unpatchify
from kinetoscope.nn.ring_cache import RingCache
from kinetoscope.nn.rope import apply_rope, rope_table, split_rope_dims
from kinetoscope.nn.split import TokenAxes
from kinetoscope.nn.stack import BlockCall, run_blocks

TOKENS = TokenAxes(each={"place.rope.tokens": 0}, groups={"modulation": 1})


class Memory(NamedTuple):
    """Keys and values of earlier frames, of all blocks: of the tokens, of the keyboard, and of the mouse if it has one.

    Made by `MatrixGameTransformer3DModel.new_memory`, owned by the run, written by each forward that is given it. Rows
    first, so that it travels as a row-first tree.
    """

    tokens: RingCache  # [R, L, M, H, D]
    keyboard: RingCache | None  # [R, L, 1, H, D]
    mouse: RingCache | None  # [R, L, M, H, D]


class ImageContext(NamedTuple):
    """Keys and values of the image features, one entry a block; rows first."""

    keys: list[Tensor]  # [R, I, H, D] each
    values: list[Tensor]


class Modulation(NamedTuple):
    """What the timesteps set, float32. Scales include their 1."""

    blocks: (
        Tensor  # [R or 1, F or 1, layers, 6, d]: shift, scale, gate of self-attention, then of the feed-forward layer
    )
    out: Tensor  # [R or 1, F or 1, 2, d]: shift, scale of the last norm


class Rope(NamedTuple):
    """Rotations, complex64."""

    tokens: Tensor  # [N, D/2]
    actions: Tensor  # [F, D/2]


class Place(NamedTuple):
    """Where the frames of a forward are, and what they see."""

    rope: Rope
    grid: tuple[int, int, int]  # F, H', W' of the tokens
    start: int  # first frame, in the memory
    memory: Memory | None
    rows: tuple[BlockRows, ...] | None  # frames that attend to others; None: all to all


class Attention(nn.Module):
    """Projections and norms over all heads at once, of self- and of cross-attention."""

    def __init__(self, dim: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.to_q = Linear(dim, dim)
        self.to_k = Linear(dim, dim)
        self.to_v = Linear(dim, dim)
        self.to_out = nn.Sequential(Linear(dim, dim))
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)

    def queries(self, x: Tensor) -> Tensor:
        """[R, F, M, d] -> [R, N, H, D]"""
        return self.norm_q(self.to_q(x)).flatten(1, 2).unflatten(-1, (-1, self.head_dim))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[R, L, d] -> two of [R, L, H, D]"""
        heads = (-1, self.head_dim)
        return self.norm_k(self.to_k(x)).unflatten(-1, heads), self.to_v(x).unflatten(-1, heads)

    def past_and_present(self, x: Tensor, place: Place, layer: int) -> Tensor:
        """Self-attention: [R, F, M, d] -> [R, F, M, d]"""
        q = apply_rope(self.queries(x), place.rope.tokens)
        k, v = self.keys_values(x.flatten(1, 2))
        k = apply_rope(k, place.rope.tokens)
        memory, grid = None if place.memory is None else place.memory.tokens, place.grid

        def remember(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            """Remembers [R, N, H, D]; [R, N', H, D] are seen"""
            assert memory is not None
            k, v = memory.update(layer, memory.split_frames(k, grid), memory.split_frames(v, grid), place.start)
            return k.flatten(1, 2), v.flatten(1, 2)

        rows = in_tokens(place.rows, grid[1] * grid[2])
        out = attention(q, k, v, role="self", rows=rows, memory=None if memory is None else remember)
        return self.to_out(out.reshape(*x.shape[:-1], -1))

    def image(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Cross-attention: [R, F, M, d] -> [R, F, M, d]"""
        return self.to_out(attention(self.queries(x), keys, values, role="cross").reshape(*x.shape[:-1], -1))


class MatrixGameBlock(nn.Module):
    """Self-attention, cross-attention to the image, actions, feed-forward, each on a residual."""

    def __init__(self, config: MatrixGameConfig, layer: int) -> None:
        super().__init__()
        dim, head_dim, eps = config.dim, config.attention_head_dim, config.eps
        self.layer = layer
        self.norm1 = ModulatedNorm(dim, eps)
        self.attn1 = Attention(dim, head_dim, eps)
        self.norm2 = FP32LayerNorm(dim, eps)
        self.attn2 = Attention(dim, head_dim, eps)
        self.action_model = ActionModule(config.action, attention) if layer in config.action.blocks else None
        self.action_layer = sorted(config.action.blocks).index(layer) if self.action_model is not None else 0
        self.norm3 = ModulatedNorm(dim, eps)
        self.ffn = FeedForward(dim, config.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 6, dim))

    def forward(
        self,
        x: Tensor,
        image: tuple[Tensor, Tensor],
        keyboard: Tensor,
        mouse: Tensor | None,
        modulation: Tensor,
        place: Place,
    ) -> Tensor:
        """x [R, F, M, d], modulation [R or 1, F or 1, 6, d] -> [R, F, M, d]"""
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = modulation.unsqueeze(3).unbind(2)  # [R, F, 1, d] each
        x = gated_add(x, self.attn1.past_and_present(self.norm1(x, shift_a, scale_a), place, self.layer), gate_a)
        x = x + self.attn2.image(self.norm2(x), *image)
        if self.action_model is not None:
            past, memory = None, place.memory
            if memory is not None and memory.keyboard is not None:
                past = ActionMemory(memory.keyboard, memory.mouse, self.action_layer, place.start)
            act = partial(
                self.action_model, keyboard=keyboard, mouse=mouse, rope=place.rope.actions, memory=past, rows=place.rows
            )
            shared = current_share() is not None
            x = _on_whole_frames(act, x, place.grid) if shared else act(x)  # pyright: ignore[reportCallIssue]
        return gated_add(x, self.ffn(self.norm3(x, shift_f, scale_f)), gate_f)


@torch.compiler.disable
def _on_whole_frames(act: Callable[[Tensor], Tensor], x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """`act`, which attends along time, where x is this process's part of the tokens: every process does all of it."""
    share = current_share()
    assert share is not None
    whole = share.gather(x.flatten(1, 2), 1).unflatten(1, (grid[0], -1))
    return share.take(act(whole).flatten(1, 2), 1).view(x.shape)


class ConditionEmbedder(nn.Module):
    """Embeddings of timestep and image."""

    def __init__(self, config: MatrixGameConfig) -> None:
        super().__init__()
        self.freq_dim = config.freq_dim
        self.time_embedder = TimestepEmbedding(config.freq_dim, config.dim)
        self.time_proj = Linear(config.dim, 6 * config.dim)
        self.image_embedder = ImageProjection(config.image_dim, config.dim, positions=None)

    def embed_time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """[R, F] -> embedding [R, F, d] and its six-way projection [R, F, 6, d]"""
        half = self.freq_dim // 2  # angles in float64, as published: warped timesteps are no whole numbers
        exponent = torch.arange(half, dtype=torch.float64, device=timestep.device) * (-math.log(10000.0) / half)
        angle = timestep.double().unsqueeze(-1) * exponent.exp()
        emb = self.time_embedder(torch.cat([angle.cos(), angle.sin()], dim=-1)).to(self.time_proj.weight.dtype)
        return emb, self.time_proj(nn.functional.silu(emb)).unflatten(-1, (6, -1))


class MatrixGameTransformer3DModel(nn.Module):
    """Matrix-Game 2 transformer, foundation and distilled.

    Built on the meta device it has exactly the names and shapes of a converted checkpoint (`spec.rename` reads the
    original repository's names); `keep_in_float32` names the parts whose weights stay float32 when the rest is in
    bfloat16.

    Args:
        config: published sizes.
    """

    keep_in_float32 = ("time_embedder", "scale_shift_table", "norm1", "norm2")

    def __init__(self, config: MatrixGameConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.patch_embedding = nn.Conv3d(
            config.in_channels, config.dim, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks = nn.ModuleList(MatrixGameBlock(config, layer) for layer in range(config.num_layers))
        self.norm_out = ModulatedNorm(config.dim, config.eps)
        self.proj_out = Linear(config.dim, config.out_channels * math.prod(config.patch_size))
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 2, config.dim))

    # -- what a run computes or allocates once ------------------------------------------------------------------------

    def new_memory(
        self, rows: int, latent_shape: Sequence[int], dtype: torch.dtype | None = None, devices: int = 1
    ) -> Memory:
        """Empty memory for a video or a stream of any length.

        Args:
            rows: R.
            latent_shape: [..., H, W] of the latents.
            dtype: of keys and values; None: that of the weights.
            devices: that share the heads of self-attention (Ulysses), each of which remembers its own.

        Raises:
            InputError: a size that is not a multiple of the patch.
        """
        config, action = self.config, self.config.action
        tokens = math.prod(self._grid((1, *latent_shape[-2:])))
        weight = self.proj_out.weight

        def ring(layers: int, tokens: int, width: int, head_dim: int, devices: int = 1) -> RingCache:
            shape = (rows, config.window, tokens, -(-(width // head_dim) // devices), head_dim)
            dt = dtype or weight.dtype
            return RingCache.allocate(layers, shape, sink=config.sink_size, dtype=dt, device=weight.device)

        # Widths are those of the layers here: where heads are shared out, a device remembers its own.
        width = self._blocks()[0].attn1.to_k.out_features
        module = next((b.action_model for b in self._blocks() if b.action_model is not None), None)
        keys = 0 if module is None else module.mouse_attn_q.out_features
        layers, size = len(action.blocks), 1 if module is None else module.head_dim
        return Memory(
            ring(config.num_layers, tokens, width, config.attention_head_dim, devices),
            ring(layers, 1, keys, size) if layers else None,
            ring(layers, tokens, keys, size) if layers and action.enable_mouse else None,
        )

    def prepare_conditioning(self, *, image_embeds: Tensor) -> dict[str, ImageContext]:
        """Keys and values of image features [R, I, image_dim], once a run."""
        embedder = self.condition_embedder.image_embedder
        features = embedder(image_embeds.to(self.proj_out.weight.dtype))  # [R, I, d]
        pairs = [block.attn2.keys_values(features) for block in self._blocks()]
        return {"image": ImageContext([k for k, _ in pairs], [v for _, v in pairs])}

    def prepare_timesteps(self, timesteps: Tensor) -> dict[str, Modulation]:
        """Modulation of each of S timesteps, or S sets of one a latent frame: [S] or [S, F] -> leading dimension S."""
        steps = [self._modulation(t.view(1, -1)) for t in timesteps]
        return {"modulation": Modulation(torch.cat([s.blocks for s in steps]), torch.cat([s.out for s in steps]))}

    def prepare_shared(self, latent_shape: Sequence[int], start_frame: int = 0) -> dict[str, Rope]:
        """Rotations of latent frames from `start_frame` on, of a shape [..., T, H, W]; positions are absolute.

        Raises:
            InputError: a size is not a multiple of the patch, or has more rows or columns than the model knows.
        """
        return {"rope": self._rope(latent_shape, start_frame)}

    # -- forward ------------------------------------------------------------------------------------------------------

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        *,
        condition: Tensor,
        keyboard: Tensor,
        mouse: Tensor | None = None,
        image_embeds: Tensor | None = None,
        memory: Memory | None = None,
        start_frame: int = 0,
        blocks: Sequence[int] | None = None,
        clean: Tensor | None = None,
        clean_timestep: Tensor | None = None,
        image: ImageContext | None = None,
        modulation: Modulation | None = None,
        rope: Rope | None = None,
    ) -> Tensor:
        """Predicted flow velocity.

        Args:
            latents: [R, C, T, H, W]; with memory the T frames from `start_frame` on.
            timestep: [R] in [0, 1000], or [R, T].
            condition: [R, C', T, H, W] mask and condition latents of the same frames.
            keyboard: [R, T, W, K] keys that each latent frame reads (`nn.action.action_windows`), or [R, P, K] of all
                pixel frames P = 1 + 4 (T - 1) of a video without memory.
            mouse: [R, T, W, 2] or [R, P, 2] camera turns; None for models without a mouse.
            image_embeds: [R, I, image_dim]; needed unless `image` is given.
            memory: keys and values of the frames before; those of `latents` are written into it.
            start_frame: place of the first frame in the video.
            blocks: sizes of the blocks of a video without memory, in latent frames; None: one block.
            clean: [R, C, T, H, W] the video without noise: block b attends to itself and to the clean blocks before it
                (teacher forcing), whose `clean_timestep` is [R, T]; None: 0.
            image, modulation, rope: what the `prepare_*` methods return, to spare computing them again.

        Returns:
            [R, C, T, H, W] in the dtype of `latents`.

        Raises:
            InputError: an input is missing or its shape does not fit; or see `rows_of_forward`.
        """
        frames, config = latents.shape[2], self.config
        rows = rows_of_forward(
            frames, blocks, config.window, config.sink_size, clean=clean is not None, remembers=memory is not None
        )
        keyboard, mouse = self._actions(frames, keyboard, mouse)
        if rope is None:
            rope = self._rope(latents.shape, start_frame)
        if clean is not None:  # twice the frames, told twice the same
            latents, timestep = torch.cat([clean, latents], 2), join_times(clean_timestep, timestep, frames)
            condition, keyboard = torch.cat([condition, condition], 2), torch.cat([keyboard, keyboard], 1)
            mouse = None if mouse is None else torch.cat([mouse, mouse], 1)
            rope = Rope(*(torch.cat([table, table]) for table in rope))
        if modulation is None:
            modulation = self._modulation(timestep if timestep.ndim == 2 else timestep.unsqueeze(1))
        if image is None:
            if image_embeds is None:
                raise InputError("the Matrix-Game transformer needs image_embeds or a prepared image")
            image = self.prepare_conditioning(image_embeds=image_embeds)["image"]

        dtype = self.patch_embedding.weight.dtype
        x = self.patch_embedding(torch.cat([latents.to(dtype), condition.to(dtype)], dim=1)).to(dtype)
        grid = x.shape[2:]  # [R, d, F, H', W']
        x = x.flatten(3).permute(0, 2, 3, 1).contiguous()  # [R, F, M, d]
        tables, place = modulation.blocks.unbind(2), Place(rope, tuple(grid), start_frame, memory, rows)
        calls = [
            BlockCall(block, {"image": (k, v), "keyboard": keyboard, "mouse": mouse, "modulation": table},
                      {"place": place}, TOKENS)
            for block, k, v, table in zip(self.blocks, image.keys, image.values, tables, strict=True)
        ]  # fmt: skip
        x = run_blocks(x, calls)  # [R, F, M, d]
        shift, scale = modulation.out.unsqueeze(3).unbind(2)  # [R, F, 1, d] each
        x = self.proj_out(self.norm_out(x, shift, scale))  # [R, F, M, pt ph pw C]
        return unpatchify(x, grid, self.config.patch_size)[:, :, -frames:].to(latents.dtype)

    def _blocks(self) -> list[MatrixGameBlock]:
        return [block for block in self.blocks if isinstance(block, MatrixGameBlock)]

    def _actions(self, frames: int, keyboard: Tensor, mouse: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Both as windows [R, T, W, C]."""
        action = self.config.action
        if action.enable_mouse != (mouse is not None):
            raise InputError(f"this model was trained {'with' if action.enable_mouse else 'without'} a mouse")
        given = {"keyboard": (keyboard, action.keyboard_dim_in), "mouse": (mouse, action.mouse_dim_in)}
        windows: list[Tensor | None] = []
        for name, (value, width) in given.items():
            if value is not None and value.ndim == 3:
                padded = pad_actions(value, action.window)
                value = action_windows(padded, action.vae_time_compression_ratio, action.window)
            if value is not None and tuple(value.shape[1:]) != (frames, action.window, width):
                raise InputError(
                    f"{name} actions of shape {list(value.shape)} do not fit {frames} latent frames, each reading "
                    f"{action.window} frames of {width} values"
                )
            windows.append(value)
        assert windows[0] is not None
        return windows[0], windows[1]

    def _modulation(self, timestep: Tensor) -> Modulation:
        """[R, F] -> tables of all blocks"""
        embedding, projected = self.condition_embedder.embed_time(timestep)  # [R, F, d], [R, F, 6, d]
        tables = torch.cat([block.scale_shift_table for block in self._blocks()])  # [layers, 6, d]
        blocks = tables.float() + projected.float().unsqueeze(2)  # [R, F, layers, 6, d]
        out = self.scale_shift_table.float() + embedding.float().unsqueeze(2)  # [R, F, 2, d]
        return Modulation(blocks + unit_scales(6, blocks), out + unit_scales(2, out))

    def _grid(self, latent_shape: Sequence[int]) -> tuple[int, int, int]:
        """[..., T, H, W] -> tokens along each axis"""
        limit = self.config.rope_max_seq_len
        return token_grid(latent_shape, self.config.patch_size, (None, limit, limit))

    def _rope(self, latent_shape: Sequence[int], start: int) -> Rope:
        device = self.proj_out.weight.device
        t, h, w = self._grid(latent_shape)
        positions = [torch.arange(a, a + n, device=device) for a, n in ((start, t), (0, h), (0, w))]
        tokens = rope_table(positions, split_rope_dims(self.config.attention_head_dim))
        return Rope(tokens, action_rope(self.config.action, start, t, device))
