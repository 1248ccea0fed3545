"""Keyboard and mouse as inputs of a block, with the parameter names of the published checkpoints (GameFactory, arXiv
2501.08325; Matrix-Game 2, arXiv 2508.13009).

R rows, F latent frames of M tokens, d width, H heads of D channels. Each latent frame reads a window of W pixel-frame
actions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kinetoscope.core.context import AttentionFn
from kinetoscope.core.errors import ConfigError
from kinetoscope.core.published import read_published
from kinetoscope.nn.block_causal import BlockRows, in_tokens
from kinetoscope.nn.linear import Linear
from kinetoscope.nn.ring_cache import RingCache
from kinetoscope.nn.rope import apply_rope, rope_table


@dataclass(frozen=True, slots=True)
class ActionConfig:
    """Sizes of the action modules, named as in the published `action_config`.

    Attributes:
        blocks: which transformer blocks have one.
        enable_mouse, enable_keyboard: which of the two it has.
        heads_num: attention heads of each.
        hidden_size: width of a key's embedding.
        img_hidden_size: width d of the transformer.
        keyboard_dim_in, mouse_dim_in: values a pixel frame.
        keyboard_hidden_dim, mouse_hidden_dim: widths of the attentions.
        mouse_qk_dim_list, rope_dim_list: channels of a head for time, height, width; only time has positions here.
            The published code reads the first list, for both attentions.
        patch_size: patch of the transformer.
        qk_norm: root-mean-square norm of queries and keys; every published model has it.
        qkv_bias: whether projections have a bias.
        rope_theta: base of the rotary frequencies.
        vae_time_compression_ratio: pixel frames a latent frame.
        windows_size: latent frames whose actions a latent frame reads.
    """

    blocks: tuple[int, ...] = ()
    enable_mouse: bool = True
    enable_keyboard: bool = True
    heads_num: int = 16
    hidden_size: int = 128
    img_hidden_size: int = 1536
    keyboard_dim_in: int = 6
    keyboard_hidden_dim: int = 1024
    mouse_dim_in: int = 2
    mouse_hidden_dim: int = 1024
    mouse_qk_dim_list: tuple[int, int, int] = (8, 28, 28)
    rope_dim_list: tuple[int, int, int] = (8, 28, 28)
    patch_size: tuple[int, int, int] = (1, 2, 2)
    qk_norm: bool = True
    qkv_bias: bool = False
    rope_theta: int = 256
    vae_time_compression_ratio: int = 4
    windows_size: int = 3

    @property
    def window(self) -> int:
        """Actions W that a latent frame reads."""
        return self.vae_time_compression_ratio * self.windows_size

    @staticmethod
    def from_dict(config: Mapping[str, Any]) -> ActionConfig:
        """Read a published `action_config`.

        Raises:
            ConfigError: unknown field, value of the wrong kind, or a variant that does not exist.
        """
        blocks = config.get("blocks")
        numbers: list[Any] = list(blocks) if isinstance(blocks, list | tuple) else [None]
        if any(type(b) is not int or b < 0 for b in numbers) or len(set(numbers)) != len(numbers):
            raise ConfigError(f"action_config: blocks={blocks!r} should be a list of different block numbers")
        plain = {name: value for name, value in config.items() if name != "blocks"}
        result = replace(read_published(ActionConfig, plain, "action_config"), blocks=tuple(numbers))
        result.check()
        return result

    def check(self) -> None:
        """Raise ConfigError where the values do not describe modules that `ActionModule` builds."""
        for name in ("heads_num", "hidden_size", "img_hidden_size", "keyboard_dim_in", "mouse_dim_in", "rope_theta"):
            if getattr(self, name) < 1:
                raise ConfigError(f"action_config: {name}={getattr(self, name)} should be positive")
        if self.vae_time_compression_ratio < 1 or self.windows_size < 1:
            raise ConfigError("action_config: vae_time_compression_ratio and windows_size should be positive")
        if not self.qk_norm or not self.enable_keyboard:
            raise ConfigError("action_config: qk_norm and enable_keyboard are true in every model that exists")
        widths = {"keyboard_hidden_dim": self.keyboard_hidden_dim}
        if self.enable_mouse:
            widths["mouse_hidden_dim"] = self.mouse_hidden_dim
        for name, width in widths.items():
            if width != self.heads_num * sum(self.mouse_qk_dim_list) or any(n % 2 for n in self.mouse_qk_dim_list):
                raise ConfigError(
                    f"action_config: {name}={width} should be {self.heads_num} heads of the channels in "
                    f"mouse_qk_dim_list={list(self.mouse_qk_dim_list)}, each even"
                )


class ActionMemory(NamedTuple):
    """Where a module finds keys and values of earlier frames.

    Attributes:
        keyboard, mouse: the caches.
        layer: which of the caches' layers is the module's.
        start: first latent frame of the forward in the video.
    """

    keyboard: RingCache
    mouse: RingCache | None
    layer: int
    start: int


def action_windows(actions: Tensor, ratio: int, window: int) -> Tensor:
    """What each latent frame reads: overlapping windows of `window` frames, `ratio` apart.

    Args:
        actions: [R, N, C] a pixel frame each, from `window` frames before the first latent frame on.

    Returns:
        [R, F, window, C] (views), F = (N - window) // ratio + 1
    """
    return actions.unfold(1, window, ratio).transpose(2, 3)


def pad_actions(actions: Tensor, window: int) -> Tensor:
    """[R, N, C] -> [R, window + N, C]: before the first frame its action is held."""
    return torch.cat([actions[:, :1].expand(-1, window, -1), actions], dim=1)


def action_rope(config: ActionConfig, start: int, frames: int, device: torch.device) -> Tensor:
    """Rotations of latent frames [start, start + frames): complex64 [F, D/2]. Height and width have one position."""
    one = torch.zeros(1, device=device)
    return rope_table(
        [torch.arange(start, start + frames, device=device), one, one], config.mouse_qk_dim_list, config.rope_theta
    )


class UnscaledRMSNorm(nn.Module):
    """Root-mean-square norm whose published weight is not used (nor was it trained: it is one)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]"""
        return F.rms_norm(x, (x.shape[-1],), None, self.eps)


class ActionModule(nn.Module):
    """Adds to every token what mouse and keyboard do.

    Mouse: token and camera turns through an MLP, then attention over time for each position. Keyboard: attention over
    time from the tokens to the keys, which all positions share. Over time means: the frames given and those remembered.

    Args:
        config: sizes.
        attend: softmax attention of q [R, N, H, D] to k and v, with keywords `role` ("mouse" or "keyboard") and `rows`.
    """

    def __init__(self, config: ActionConfig, attend: AttentionFn) -> None:
        super().__init__()
        self.attend = attend
        dim, heads, bias = config.img_hidden_size, config.heads_num, config.qkv_bias
        self.head_dim = config.keyboard_hidden_dim // heads  # the mouse's too, where there is one
        if config.enable_mouse:
            width = config.mouse_hidden_dim
            self.mouse_mlp = nn.Sequential(
                Linear(config.mouse_dim_in * config.window + dim, width),
                nn.GELU(approximate="tanh"),
                Linear(width, width),
                nn.LayerNorm(width),
            )
            self.t_qkv = Linear(width, 3 * width, bias=bias)
            self.img_attn_q_norm = UnscaledRMSNorm(width // heads)
            self.img_attn_k_norm = UnscaledRMSNorm(width // heads)
            self.proj_mouse = Linear(width, dim, bias=bias)
        width, hidden = config.keyboard_hidden_dim, config.hidden_size
        self.keyboard_embed = nn.Sequential(Linear(config.keyboard_dim_in, hidden), nn.SiLU(), Linear(hidden, hidden))
        self.key_attn_q_norm = UnscaledRMSNorm(width // heads)
        self.key_attn_k_norm = UnscaledRMSNorm(width // heads)
        self.mouse_attn_q = Linear(dim, width, bias=bias)  # named so; it makes the queries of the keyboard
        self.keyboard_attn_kv = Linear(hidden * config.window, 2 * width, bias=bias)
        self.proj_keyboard = Linear(width, dim, bias=bias)
        self.enable_mouse = config.enable_mouse

    def forward(
        self,
        x: Tensor,
        keyboard: Tensor,
        mouse: Tensor | None,
        rope: Tensor,
        memory: ActionMemory | None,
        rows: Sequence[BlockRows] | None = None,
    ) -> Tensor:
        """x [R, F, M, d], keyboard [R, F, W, K], mouse [R, F, W, 2], rope [F, D/2], `rows` of frames that attend to
        others (None: all to all) -> [R, F, M, d]"""
        if self.enable_mouse and mouse is not None:
            x = x + self._turn(x, mouse, rope, memory, rows)
        return x + self._press(x, keyboard, rope, memory, rows)

    def _turn(
        self, x: Tensor, mouse: Tensor, rope: Tensor, memory: ActionMemory | None, seen: Sequence[BlockRows] | None
    ) -> Tensor:
        rows, frames, tokens = x.shape[:3]
        turns = mouse.to(x.dtype).flatten(2).unsqueeze(2).expand(-1, -1, tokens, -1)  # [R, F, M, 2 W]
        qkv = self.t_qkv(self.mouse_mlp(torch.cat([x, turns], dim=-1)))
        q, k, v = qkv.unflatten(-1, (3, -1, self.head_dim)).unbind(3)  # [R, F, M, H, D] each
        table = rope.repeat_interleave(tokens, dim=0)  # [F M, D/2]
        q = apply_rope(self.img_attn_q_norm(q).flatten(1, 2), table).unflatten(1, (frames, tokens))
        k = apply_rope(self.img_attn_k_norm(k).flatten(1, 2), table).unflatten(1, (frames, tokens))
        if memory is not None and memory.mouse is not None:
            k, v = memory.mouse.update(memory.layer, k, v, memory.start)  # [R, l, M, H, D]
        q, k, v = (part.transpose(1, 2).flatten(0, 1) for part in (q, k, v))  # [R M, F or l, H, D]
        out = self.attend(q, k, v, role="mouse", rows=seen).flatten(2).view(rows, tokens, frames, -1)
        return self.proj_mouse(out.transpose(1, 2))

    def _press(
        self, x: Tensor, keyboard: Tensor, rope: Tensor, memory: ActionMemory | None, seen: Sequence[BlockRows] | None
    ) -> Tensor:
        frames, tokens = x.shape[1:3]
        keys = self.keyboard_embed(keyboard.to(x.dtype)).flatten(2)  # [R, F, W h]
        k, v = self.keyboard_attn_kv(keys).unflatten(-1, (2, -1, self.head_dim)).unbind(2)  # [R, F, H, D] each
        q = self.key_attn_q_norm(self.mouse_attn_q(x).unflatten(-1, (-1, self.head_dim)))  # [R, F, M, H, D]
        q = apply_rope(q.flatten(1, 2), rope.repeat_interleave(tokens, dim=0))  # [R, F M, H, D]
        k = apply_rope(self.key_attn_k_norm(k), rope)
        if memory is not None:
            k, v = memory.keyboard.update(memory.layer, k.unsqueeze(2), v.unsqueeze(2), memory.start)
            k, v = k.squeeze(2), v.squeeze(2)  # [R, l, H, D]
        out = self.attend(q, k, v, role="keyboard", rows=in_tokens(seen, tokens, 1))
        return self.proj_keyboard(out.flatten(2).unflatten(1, (frames, tokens)))
