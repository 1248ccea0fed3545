"""The Wan video transformer (arXiv 2503.20314), parameter names as in the published diffusers checkpoints.

R rows, F modulation groups of M tokens each (F = 1: one timestep a row), N = F M tokens, d width, H heads of D
channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from kinetoscope.attention import attention
from kinetoscope.core.errors import InputError
from kinetoscope.models.wan.config import WanConfig
from kinetoscope.nn.camera import CameraAdapter, Controls, add_controls
from kinetoscope.nn.embeddings import ConditionEmbedder
from kinetoscope.nn.feed_forward import FeedForward
from kinetoscope.nn.linear import Linear
from kinetoscope.nn.norm import FP32LayerNorm, ModulatedNorm, RMSNorm, gated_add, unit_scales
from kinetoscope.nn.patches import token_grid, unpatchify
from kinetoscope.nn.rope import apply_rope, rope_table, split_rope_dims
from kinetoscope.nn.split import TokenAxes
from kinetoscope.nn.stack import BlockCall, run_blocks
from kinetoscope.nn.text_padding import PADDED, read_before_text, read_text

Grid = tuple[int, int, int]
"""Tokens of a video along time, height, width."""

TOKENS = TokenAxes(each={"rope": 0}, groups={"modulation": 1})
"""Which arguments of a block go with its tokens."""


class TextContext(NamedTuple):
    """What cross-attention needs of text and image, one entry a block; rows first."""

    keys: list[Tensor]  # [R, L, H, D] each
    values: list[Tensor]  # [R, L, H, D] each
    key_bias: Tensor | None  # [R, L] float32, None: all tokens count once
    image: list[tuple[Tensor, Tensor]] | None = None  # keys and values [R, I, H, D] of image features


class Modulation(NamedTuple):
    """What the timestep sets, float32. Scales include their 1."""

    blocks: Tensor  # [R or 1, F, layers, 6, d]: shift, scale, gate of self-attention, then of the feed-forward layer
    out: Tensor  # [R or 1, F, 2, d]: shift, scale of the last norm


class SelfAttention(nn.Module):
    """Attention over the tokens of the video, RMS norm over all heads at once, rotary positions."""

    def __init__(self, dim: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.to_q = Linear(dim, dim)
        self.to_k = Linear(dim, dim)
        self.to_v = Linear(dim, dim)
        self.to_out = nn.Sequential(Linear(dim, dim))
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)

    def project(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values: [R, F, M, d] -> three of [R, N, H, D]"""
        q, k, v = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(x)), self.to_v(x)
        q, k, v = (t.flatten(1, 2).unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        return apply_rope(q, rope), apply_rope(k, rope), v

    def forward(
        self, x: Tensor, rope: Tensor, grid: Grid | None = None, gate: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """[R, F, M, d] -> [R, F, M, d]; see `attention` for grid and gate."""
        q, k, v = self.project(x, rope)
        return self.to_out(attention(q, k, v, role="self", grid=grid, gate=gate).reshape(*x.shape[:-1], -1))


class CrossAttention(nn.Module):
    """Attention from the tokens of the video to those of the text and, added to it, to those of an image."""

    def __init__(self, dim: int, head_dim: int, eps: float, added_dim: int | None = None) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.to_q = Linear(dim, dim)
        self.to_k = Linear(dim, dim)
        self.to_v = Linear(dim, dim)
        self.to_out = nn.Sequential(Linear(dim, dim))
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)
        if added_dim is not None:
            self.add_k_proj = Linear(added_dim, dim)
            self.add_v_proj = Linear(added_dim, dim)
            self.norm_added_k = RMSNorm(dim, eps)

    def project(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of embedded text: [R, L, d] -> two of [R, L, H, D]"""
        heads = (-1, self.head_dim)
        return self.norm_k(self.to_k(text)).unflatten(-1, heads), self.to_v(text).unflatten(-1, heads)

    def project_image(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of embedded image features: [R, I, d] -> two of [R, I, H, D]"""
        heads = (-1, self.head_dim)
        keys = self.norm_added_k(self.add_k_proj(features)).unflatten(-1, heads)
        return keys, self.add_v_proj(features).unflatten(-1, heads)

    def forward(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        key_bias: Tensor | None,
        image: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """[R, F, M, d] -> [R, F, M, d]"""
        q = self.norm_q(self.to_q(x)).flatten(1, 2).unflatten(-1, (-1, self.head_dim))
        out = attention(q, keys, values, role="cross", key_bias=key_bias)
        if image is not None:
            out = out + attention(q, *image, role="cross")
        return self.to_out(out.reshape(*x.shape[:-1], -1))


class WanTransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each on a residual."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim, head_dim, eps = config.dim, config.attention_head_dim, config.eps
        self.norm1 = ModulatedNorm(dim, eps)
        self.attn1 = SelfAttention(dim, head_dim, eps)
        self.attn2 = CrossAttention(dim, head_dim, eps, config.added_kv_proj_dim)
        self.norm2 = FP32LayerNorm(dim, eps) if config.cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(dim, config.ffn_dim)
        self.norm3 = ModulatedNorm(dim, eps)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 6, dim))
        self.gated = config.compress_gates
        if self.gated:
            self.to_gate_compress = Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        key_bias: Tensor | None,
        modulation: Tensor,
        rope: Tensor,
        image: tuple[Tensor, Tensor] | None = None,
        grid: Grid | None = None,
    ) -> Tensor:
        """x [R, F, M, d], modulation [R or 1, F, 6, d] -> [R, F, M, d]; the tokens are those of a video's `grid`."""
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = modulation.unsqueeze(3).unbind(2)  # [R, F, 1, d] each
        y = self.norm1(x, shift_a, scale_a)
        gate = (lambda: self._compress_gate(y)) if self.gated else None
        x = gated_add(x, self.attn1(y, rope, grid, gate), gate_a)
        x = x + self.attn2(self.norm2(x), keys, values, key_bias, image)
        return gated_add(x, self.ffn(self.norm3(x, shift_f, scale_f)), gate_f)

    def _compress_gate(self, y: Tensor) -> Tensor:
        """Gates of video sparse attention (arXiv 2505.13389): [R, F, M, d] -> [R, N, H, D]"""
        return self.to_gate_compress(y).flatten(1, 2).unflatten(-1, (-1, self.attn1.head_dim))

    def time_signal(self, modulation: Tensor, **rows: Any) -> Tensor:
        """The projected time embedding in this block's `modulation`, without its table: [R or 1, F, 6, d]."""
        return modulation - self.scale_shift_table.to(modulation) - unit_scales(6, modulation)


class WanTransformer3DModel(nn.Module):
    """Wan video transformer: text-to-video, and image-to-video and control by added channels and image features.

    Built on the meta device it has exactly the names and shapes of a published checkpoint; `keep_in_float32` names the
    parts whose weights stay float32 when the rest is in bfloat16.

    Args:
        config: published sizes.
    """

    keep_in_float32 = ("time_embedder", "scale_shift_table", "norm2")
    token_axes: ClassVar[TokenAxes] = TOKENS

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.patch_embedding = nn.Conv3d(
            config.in_channels, config.dim, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.condition_embedder = ConditionEmbedder(
            config.freq_dim, config.dim, config.text_dim, config.image_dim, config.pos_embed_seq_len
        )
        self.blocks = nn.ModuleList(WanTransformerBlock(config) for _ in range(config.num_layers))
        self.norm_out = ModulatedNorm(config.dim, config.eps)
        self.proj_out = Linear(config.dim, config.out_channels * math.prod(config.patch_size))
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 2, config.dim))
        patch = config.patch_size[1:]
        if config.add_control_adapter:
            downscale = config.downscale_factor_control_adapter
            self.control_adapter = CameraAdapter(config.in_dim_control_adapter, config.dim, patch, downscale)
        if config.add_ref_conv:
            self.ref_conv = nn.Conv2d(config.in_dim_ref_conv, config.dim, kernel_size=patch, stride=patch)

    def init_weights(self, generator: torch.Generator) -> None:
        """Fill all parameters for training from nothing, from a CPU `generator`.

        Linear layers Xavier uniform with zero bias, text and time embeddings normal 0.02, modulation tables normal
        d^-1/2, output projection zero: the initialisation of the original Wan code; gates of video sparse attention
        zero (arXiv 2505.13389).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
                nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator)
                nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]
            elif isinstance(module, FP32LayerNorm | RMSNorm):
                module.reset_parameters()
        for part in (self.condition_embedder.text_embedder, self.condition_embedder.time_embedder):
            nn.init.normal_(part.linear_1.weight, std=0.02, generator=generator)
            nn.init.normal_(part.linear_2.weight, std=0.02, generator=generator)
        for name, parameter in self.named_parameters():
            if name.endswith("scale_shift_table"):
                nn.init.normal_(parameter, std=self.config.dim**-0.5, generator=generator)
        nn.init.zeros_(self.proj_out.weight)
        for block in self._blocks():
            if block.gated:
                nn.init.zeros_(block.to_gate_compress.weight)

    def prepare_conditioning(
        self,
        *,
        encoder_hidden_states: Tensor,
        text_lengths: Tensor | None = None,
        text_mode: str = PADDED,
        image_embeds: Tensor | None = None,
        camera: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> dict[str, Any]:
        """Keys and values of text and image for all blocks, and the tokens of control models, once a run.

        Wan attends to its zero padding: the tokens beyond the true length are part of what it learned. With
        `text_lengths` they are not computed one by one (`nn.text_padding`).

        Args:
            encoder_hidden_states: [R, L, text_dim].
            text_lengths: [R] true lengths; every token beyond must be zero. None: use all L tokens as they are.
            text_mode: whether the zeros are attended to (`nn.text_padding.read_text`).
            image_embeds: [R, I, image_dim] for models that read image features.
            camera: [R, in_dim_control_adapter, T, H, W] rays of every pixel of the video's frames, those of a latent
                frame on channels, for models with a control adapter; None: the camera is not told.
            reference: [R, in_dim_ref_conv, h, w] latents of a picture, for models that read one; zeros for none.

        Raises:
            InputError: a length is not in [0, L]; image features are given to a model without them, or the reverse;
                so with a camera or a reference.
        """
        key_bias = None
        if text_lengths is not None:
            encoder_hidden_states, key_bias = read_text(encoder_hidden_states, text_lengths, text_mode)
        embedder = self.condition_embedder.text_embedder
        text = embedder(encoder_hidden_states.to(embedder.linear_1.weight.dtype))  # [R, L', d]
        features, image = self._image_features(image_embeds), None
        if features is not None and self.config.added_kv_proj_dim is None:
            text, key_bias = read_before_text(features, text, key_bias)
        elif features is not None:
            image = [block.attn2.project_image(features) for block in self._blocks()]
        pairs = [block.attn2.project(text) for block in self._blocks()]
        context = {"text": TextContext([k for k, _ in pairs], [v for _, v in pairs], key_bias, image)}
        controls = self._controls(camera, reference)
        return context if controls is None else context | {"controls": controls}

    def _controls(self, camera: Tensor | None, reference: Tensor | None) -> Controls | None:
        """The tokens of control models; None for others."""
        config, dtype = self.config, self.proj_out.weight.dtype
        if camera is not None and not config.add_control_adapter:
            raise InputError("this Wan transformer takes no camera (add_control_adapter is off)")
        if (reference is not None) != config.add_ref_conv:
            needs = "needs" if reference is None else "takes no"
            raise InputError(f"this Wan transformer {needs} reference latents (add_ref_conv={config.add_ref_conv})")
        if camera is None and reference is None:
            return None
        return Controls(
            None if camera is None else self.control_adapter(camera.to(dtype)),
            None if reference is None else self.ref_conv(reference.to(dtype)).unsqueeze(2),
        )

    def _image_features(self, image_embeds: Tensor | None) -> Tensor | None:
        """Embed image features: [R, I, image_dim] -> [R, I, d]"""
        reads = self.config.image_dim if image_embeds is not None else self.config.added_kv_proj_dim
        if (image_embeds is None) != (reads is None):  # where no layer is their own, image features may be left out
            needs = "needs" if image_embeds is None else "takes no"
            raise InputError(f"this Wan transformer {needs} image features (image_dim={self.config.image_dim})")
        if image_embeds is None:
            return None
        return self.condition_embedder.image_embedder(image_embeds.to(self.proj_out.weight.dtype))

    def prepare_timesteps(self, timesteps: Tensor) -> dict[str, Modulation]:
        """Modulation of each of S timesteps, or of S sets of one a latent frame: [S] or [S, F] -> leading dimension S.

        Each is computed alone, so a step has the same bits as a forward of one row that was given its timestep.
        """
        steps = [self._modulation(t.view(1, -1)) for t in timesteps]
        return {"modulation": Modulation(torch.cat([s.blocks for s in steps]), torch.cat([s.out for s in steps]))}

    def prepare_shared(self, latent_shape: Sequence[int]) -> dict[str, Tensor]:
        """Rotary table of a latent shape [..., T, H, W], once a run.

        Raises:
            InputError: a size is not a multiple of the patch, or has more positions than the model knows.
        """
        *more, frames, height, width = latent_shape
        frames += self.config.patch_size[0] * self.config.add_ref_conv  # the reference stands before the first
        return {"rope": self._rope((*more, frames, height, width))}

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *,
        text_lengths: Tensor | None = None,
        image_embeds: Tensor | None = None,
        text: TextContext | None = None,
        modulation: Modulation | None = None,
        rope: Tensor | None = None,
        camera: Tensor | None = None,
        reference: Tensor | None = None,
        controls: Controls | None = None,
    ) -> Tensor:
        """Predicted flow velocity.

        Args:
            latents: [R, C, T, H, W].
            timestep: [R] in [0, 1000], or [R, F]: one for each of F groups of consecutive tokens (latent frames).
            encoder_hidden_states: [R, L, text_dim]; needed unless `text` is given.
            text_lengths, image_embeds, camera, reference: see `prepare_conditioning`.
            text, modulation, rope, controls: what the `prepare_*` methods return, to spare computing them again.

        Returns:
            [R, C, T, H, W] in the dtype of `latents`.
        """
        if rope is None:
            rope = self.prepare_shared(latents.shape)["rope"]
        if modulation is None:
            modulation = self._modulation(timestep if timestep.ndim == 2 else timestep.unsqueeze(1))
        if text is None:
            if encoder_hidden_states is None:
                raise InputError("the Wan transformer needs encoder_hidden_states or prepared text")
            prepared = self.prepare_conditioning(
                encoder_hidden_states=encoder_hidden_states, text_lengths=text_lengths, image_embeds=image_embeds,
                camera=camera, reference=reference,
            )  # fmt: skip
            text, controls = cast(TextContext, prepared["text"]), prepared.get("controls")

        dtype = self.patch_embedding.weight.dtype
        x = self.patch_embedding(latents.to(dtype)).to(dtype)  # [R, d, T', H', W']
        if controls is not None:
            x = add_controls(x, controls)
        frames, height, width = grid = x.shape[2:]
        groups = modulation.out.shape[1]
        x = x.flatten(2).transpose(1, 2).contiguous().unflatten(1, (groups, -1))  # [R, F, M, d]
        tables = modulation.blocks.unbind(2)
        images = text.image or [None] * len(self.blocks)
        calls = [
            BlockCall(block, {"keys": k, "values": v, "key_bias": text.key_bias, "modulation": table, "image": image},
                      {"rope": rope, "grid": (frames, height, width)}, self.token_axes)
            for block, k, v, image, table in zip(self.blocks, text.keys, text.values, images, tables, strict=True)
        ]  # fmt: skip
        x = run_blocks(x, calls)  # [R, F, M, d]
        shift, scale = modulation.out.unsqueeze(3).unbind(2)  # [R, F, 1, d] each
        x = self.proj_out(self.norm_out(x, shift, scale))  # [R, F, M, pt ph pw C]
        return unpatchify(x, grid, self.config.patch_size)[:, :, -latents.shape[2] :].to(latents.dtype)

    def _blocks(self) -> list[WanTransformerBlock]:
        return [block for block in self.blocks if isinstance(block, WanTransformerBlock)]

    def _modulation(self, timestep: Tensor) -> Modulation:
        """[R, F] -> tables of all blocks"""
        embedding, projected = self.condition_embedder.embed_time(timestep)  # [R, F, d], [R, F, 6, d]
        tables = torch.cat([block.scale_shift_table for block in self._blocks()])  # [layers, 6, d]
        blocks = tables.float() + projected.float().unsqueeze(2)  # [R, F, layers, 6, d]
        out = self.scale_shift_table.float() + embedding.float().unsqueeze(2)  # [R, F, 2, d]
        return Modulation(blocks + unit_scales(6, blocks), out + unit_scales(2, out))

    def _rope(self, latent_shape: Sequence[int], start_frame: int = 0) -> Tensor:
        """[..., T, H, W] of frames from `start_frame` on -> complex64 [N, D/2]"""
        grid = token_grid(latent_shape, self.config.patch_size, (self.config.rope_max_seq_len,) * 3)
        positions = [torch.arange(n, device=self.proj_out.weight.device) for n in grid]
        positions[0] = positions[0] + start_frame
        return rope_table(positions, split_rope_dims(self.config.attention_head_dim))
