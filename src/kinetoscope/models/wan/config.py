"""The published `transformer/config.json` of a Wan model, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kinetoscope.core.published import HeadedConfig


@dataclass(frozen=True, slots=True)
class WanConfig(HeadedConfig):
    """Sizes of a Wan transformer, named as in the published file (defaults are the published class's, the 14B model).

    Attributes:
        patch_size: latent frames, rows and columns a token covers.
        num_attention_heads, attention_head_dim: their product is the width d.
        in_channels, out_channels: latent channels in and out.
        text_dim: width of the text encoder.
        freq_dim: width of the sinusoidal timestep embedding.
        ffn_dim: hidden width of the feed-forward layers.
        num_layers: number of blocks.
        cross_attn_norm: whether the cross-attention input has an affine layer norm.
        qk_norm: normalisation of queries and keys; every published model has "rms_norm_across_heads".
        eps: epsilon of all norms.
        rope_max_seq_len: largest number of positions along an axis.
        image_dim, added_kv_proj_dim: width of the image encoder and of its embedded features, in Wan 2.1
            image-to-video; else None.
        pos_embed_seq_len: tokens of two images together, in first-and-last-frame models; else None.
        compress_gates: whether the blocks hold the gates of video sparse attention (arXiv 2505.13389). No published
            configuration says so; it is read from the weights. Dense attention does not use them.
        add_control_adapter: whether the camera's rays are added to the tokens (Wan2.1-Fun Control-Camera).
        in_dim_control_adapter, downscale_factor_control_adapter: channels of the rays of a latent frame, and pixels
            that a latent row or column covers.
        add_ref_conv: whether a picture that the video should be like is read as a frame before the first
            (Wan2.1-Fun-V1.1 Control).
        in_dim_ref_conv: latent channels of that picture.
    """

    what: ClassVar[str] = "Wan transformer"
    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    qk_norm: str = "rms_norm_across_heads"
    eps: float = 1e-6
    rope_max_seq_len: int = 1024
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    pos_embed_seq_len: int | None = None
    compress_gates: bool = False
    add_control_adapter: bool = False
    in_dim_control_adapter: int = 24
    downscale_factor_control_adapter: int = 8
    add_ref_conv: bool = False
    in_dim_ref_conv: int = 16

    def check(self) -> None:
        """Raise ConfigError where the values do not describe a model that `WanTransformer3DModel` builds."""
        HeadedConfig.check(self)
        self.check_rope_pairs(6)
        self.require(qk_norm="rms_norm_across_heads")
        if self.freq_dim % 2:
            raise self.error(f"freq_dim={self.freq_dim} should be even")
        if self.image_dim is None and self.added_kv_proj_dim is not None:
            raise self.error(
                f"added_kv_proj_dim={self.added_kv_proj_dim} and image_dim=None: layers that read image features need "
                "image_dim, which goes with them in image-to-video models"
            )
