"""The published `transformer/config.json` of an LTX-Video model, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kinetoscope.core.published import HeadedConfig


@dataclass(frozen=True, slots=True)
class LTXConfig(HeadedConfig):
    """Sizes of an LTX-Video transformer, named as in the published file (defaults are those of the 2B model).

    Attributes:
        in_channels, out_channels: latent channels in and out.
        patch_size, patch_size_t: latent positions a token covers, spatial and temporal; 1 in every published model.
        num_attention_heads, attention_head_dim: their product is the width d.
        cross_attention_dim: width of the projected text, d.
        num_layers: number of blocks.
        activation_fn: of the feed-forward layers; "gelu-approximate".
        qk_norm: normalisation of queries and keys; "rms_norm_across_heads".
        norm_elementwise_affine: whether the norms of a block have weights; no published model's have.
        norm_eps: epsilon of the norms of a block.
        caption_channels: width of the text encoder.
        attention_bias, attention_out_bias: whether the projections of attention have biases.
    """

    what: ClassVar[str] = "LTX transformer"
    in_channels: int = 128
    out_channels: int | None = 128
    patch_size: int = 1
    patch_size_t: int = 1
    num_attention_heads: int = 32
    attention_head_dim: int = 64
    cross_attention_dim: int = 2048
    num_layers: int = 28
    activation_fn: str = "gelu-approximate"
    qk_norm: str = "rms_norm_across_heads"
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-6
    caption_channels: int = 4096
    attention_bias: bool = True
    attention_out_bias: bool = True

    def check(self) -> None:
        """Raise ConfigError where the values do not describe a model that `LTXVideoTransformer3DModel` builds."""
        HeadedConfig.check(self)
        self.require(
            patch_size=1,
            patch_size_t=1,
            activation_fn="gelu-approximate",
            qk_norm="rms_norm_across_heads",
            norm_elementwise_affine=False,
            cross_attention_dim=self.dim,
        )
        if self.attention_head_dim % 2 or self.dim < 6:
            raise self.error(
                f"attention_head_dim={self.attention_head_dim} should be even and the width {self.dim} at least 6 "
                "(three rotary axes of whole pairs)"
            )
