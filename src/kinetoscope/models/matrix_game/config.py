"""The published `config.json` of a Matrix-Game 2 transformer, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from kinetoscope.core.published import HeadedConfig, read_published, require_positive
from kinetoscope.nn.action import ActionConfig

ORIGINAL_NAMES = {"in_dim": "in_channels", "out_dim": "out_channels", "num_heads": "num_attention_heads"}
"""Fields of the original repository's file and of the converted one."""
UNBOUNDED_WINDOW = 15
"""Latent frames that are remembered where `local_attn_size` is -1, as published."""
WITHOUT_EFFECT = (  # of models with text, or of training
    "added_kv_proj_dim",
    "inject_sample_info",
    "model_type",
    "pos_embed_seq_len",
    "rope_cache_policy",
    "sliding_window_num_frames",
    "text_dim",
    "text_len",
)


@dataclass(frozen=True, slots=True)
class MatrixGameConfig(HeadedConfig):
    """Sizes of a Matrix-Game 2 transformer (defaults are those of the published models).

    Attributes:
        patch_size: latent frames, rows and columns a token covers.
        num_attention_heads, attention_head_dim: their product is the width d.
        in_channels: noisy latents, mask and condition latents.
        out_channels: latent channels.
        image_dim: width of the image features.
        freq_dim: width of the sinusoidal timestep embedding.
        ffn_dim: hidden width of the feed-forward layers.
        num_layers: number of blocks.
        cross_attn_norm, qk_norm: as in Wan; every published model has both.
        eps: epsilon of the norms.
        rope_max_seq_len: largest number of rows or columns of tokens.
        local_attn_size: latent frames a block attends to, its own included; -1: all.
        sink_size: first latent frames that every block attends to.
        num_frames_per_block: latent frames made together.
        action: the action modules.
    """

    what: ClassVar[str] = "Matrix-Game transformer"
    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 12
    attention_head_dim: int = 128
    in_channels: int = 36
    out_channels: int = 16
    image_dim: int = 1280
    freq_dim: int = 256
    ffn_dim: int = 8960
    num_layers: int = 30
    cross_attn_norm: bool = True
    qk_norm: str = "rms_norm_across_heads"
    eps: float = 1e-6
    rope_max_seq_len: int = 1024
    local_attn_size: int = -1
    sink_size: int = 0
    num_frames_per_block: int = 3
    action: ActionConfig = ActionConfig()  # noqa: RUF009 - frozen

    @property
    def condition_channels(self) -> int:
        """Channels of mask and condition latents."""
        return self.in_channels - self.out_channels

    @property
    def window(self) -> int:
        """Latent frames that a block attends to, its own included."""
        return UNBOUNDED_WINDOW if self.local_attn_size == -1 else self.local_attn_size

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> MatrixGameConfig:
        """Read a parsed `config.json`, in the original repository's words or in those of converted directories.

        Raises:
            ConfigError: unknown field, value of the wrong kind, or a variant this family does not have.
        """
        given = {ORIGINAL_NAMES.get(k, k): v for k, v in config.items() if k[:1] != "_" and k not in WITHOUT_EFFECT}
        action = given.pop("action_config", None)
        if not isinstance(action, Mapping) or not action:
            raise cls.error(f"action_config={action!r} should be an object with the action modules")
        if (width := given.pop("dim", None)) is not None:
            heads = given.get("num_attention_heads")
            if type(width) is not int or type(heads) is not int or heads < 1 or width % heads:
                raise cls.error(f"dim={width!r} should be a multiple of num_heads={heads!r}")
            given["attention_head_dim"] = width // heads
        if given.get("qk_norm") is True:
            del given["qk_norm"]
        if "action" in given:
            raise cls.error("unknown fields ['action']")
        result = replace(read_published(cls, given, cls.what), action=ActionConfig.from_dict(action))
        result.check()
        return result

    def check(self) -> None:
        """Raise ConfigError where the values do not describe a model that `MatrixGameTransformer3DModel` builds."""
        require_positive(replace(self, local_attn_size=1, sink_size=1), self.what)
        if self.qk_norm != "rms_norm_across_heads" or not self.cross_attn_norm:
            raise self.error("only qk_norm='rms_norm_across_heads' with cross_attn_norm=true exists")
        self.check_rope_pairs(6)
        if self.freq_dim % 2 or self.patch_size[0] != 1:
            raise self.error("freq_dim should be even and a token should cover one latent frame")
        if self.condition_channels <= self.out_channels:
            raise self.error(
                f"in_channels={self.in_channels} should hold {self.out_channels} noisy channels, "
                "as many condition latents and a mask"
            )
        room = self.sink_size + self.num_frames_per_block
        if self.sink_size < 0 or (self.local_attn_size != -1 and self.local_attn_size < room):
            raise self.error(
                f"local_attn_size={self.local_attn_size} should be -1, or have room for "
                f"sink_size={self.sink_size} and a block of {self.num_frames_per_block}"
            )
        if self.action.img_hidden_size != self.dim or any(b >= self.num_layers for b in self.action.blocks):
            raise self.error(
                f"action_config has img_hidden_size={self.action.img_hidden_size} and blocks up to "
                f"{max(self.action.blocks, default=None)}; this transformer is {self.dim} wide with {self.num_layers}"
            )
