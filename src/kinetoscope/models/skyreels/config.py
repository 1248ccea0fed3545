"""The published `transformer/config.json` of a SkyReels-V2 model, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kinetoscope.core.published import HeadedConfig


@dataclass(frozen=True, slots=True)
class SkyReelsConfig(HeadedConfig):
    """Sizes of a SkyReels-V2 transformer, named as in the published file (defaults are the published class's).

    Attributes:
        patch_size: latent frames, rows and columns a token covers.
        num_attention_heads, attention_head_dim: their product is the width d.
        in_channels, out_channels: latent channels in and out.
        text_dim: width of the text encoder.
        freq_dim: width of the sinusoidal timestep embedding.
        ffn_dim: hidden width of the feed-forward layers.
        num_layers: number of blocks.
        cross_attn_norm: whether the cross-attention input has an affine layer norm.
        qk_norm: normalisation of queries and keys; "rms_norm_across_heads".
        eps: epsilon of all norms.
        image_dim, added_kv_proj_dim, pos_embed_seq_len: image features of image-to-video; None without.
        rope_max_seq_len: largest number of positions along an axis.
        inject_sample_info: whether the frame rate conditions the model.
        num_frame_per_block: latent frames of a block of causal attention; 1 attends to everything.
    """

    what: ClassVar[str] = "SkyReels-V2 transformer"
    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 16
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int | None = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 8192
    num_layers: int = 32
    cross_attn_norm: bool = True
    qk_norm: str | None = "rms_norm_across_heads"
    eps: float = 1e-6
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    rope_max_seq_len: int = 1024
    pos_embed_seq_len: int | None = None
    inject_sample_info: bool = False
    num_frame_per_block: int = 1

    def check(self) -> None:
        """Raise ConfigError where the values do not describe a model that `SkyReelsV2Transformer3DModel` builds."""
        HeadedConfig.check(self)
        self.check_rope_pairs(6)
        self.require(qk_norm="rms_norm_across_heads")
        if self.freq_dim % 2:
            raise self.error(f"freq_dim={self.freq_dim} should be even")
        if self.image_dim is None and self.added_kv_proj_dim is not None:
            raise self.error(
                f"added_kv_proj_dim={self.added_kv_proj_dim} and image_dim=None: layers that read image features need "
                "image_dim"
            )
        if self.added_kv_proj_dim not in (None, self.dim):
            raise self.error(f"added_kv_proj_dim={self.added_kv_proj_dim} should be the width {self.dim}")
