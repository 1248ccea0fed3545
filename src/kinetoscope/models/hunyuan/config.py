"""The published `transformer/config.json` of a HunyuanVideo model, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kinetoscope.core.published import HeadedConfig

IMAGE_CONDITIONS = ("latent_concat", "token_replace")


@dataclass(frozen=True, slots=True)
class HunyuanVideoConfig(HeadedConfig):
    """Sizes of a HunyuanVideo transformer, named as in the published file (defaults are those of text-to-video).

    Attributes:
        in_channels, out_channels: latent channels in and out; None out: as in.
        num_attention_heads, attention_head_dim: their product is the width d.
        num_layers, num_single_layers: blocks with two streams, and blocks with one.
        num_refiner_layers: blocks of the token refiner.
        mlp_ratio: hidden width of the feed-forward layers by d.
        patch_size, patch_size_t: latent positions a token covers each way in space, and in time.
        qk_norm: normalisation of queries and keys; every published model has "rms_norm".
        guidance_embeds: whether the guidance scale is embedded (the distilled models).
        text_embed_dim: width of the language model.
        pooled_projection_dim: width of the pooled CLIP text.
        rope_theta, rope_axes_dim: base of the rotary frequencies, and channels of a head for time, height, width.
        image_condition_type: how an image conditions: "latent_concat" (its latents and a mask are added channels),
            "token_replace" (its latents are the first frame, modulated as clean), or None (text-to-video).
    """

    what: ClassVar[str] = "HunyuanVideo transformer"
    in_channels: int = 16
    out_channels: int | None = 16
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    num_layers: int = 20
    num_single_layers: int = 40
    num_refiner_layers: int = 2
    mlp_ratio: float = 4.0
    patch_size: int = 2
    patch_size_t: int = 1
    qk_norm: str = "rms_norm"
    guidance_embeds: bool = True
    text_embed_dim: int = 4096
    pooled_projection_dim: int = 768
    rope_theta: float = 256.0
    rope_axes_dim: tuple[int, int, int] = (16, 56, 56)
    image_condition_type: str | None = None

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns of a token."""
        return (self.patch_size_t, self.patch_size, self.patch_size)

    @property
    def latent_channels(self) -> int:
        """Channels of the sample itself: `in_channels` without an added condition and its mask."""
        return (self.in_channels - 1) // 2 if self.image_condition_type == "latent_concat" else self.in_channels

    def check(self) -> None:
        """Raise ConfigError where the values do not describe a model that `HunyuanVideoTransformer3DModel` builds."""
        HeadedConfig.check(self)
        self.require(qk_norm="rms_norm")
        self.check_rope_axes(self.rope_axes_dim)
        if self.image_condition_type not in (None, *IMAGE_CONDITIONS):
            known = f"known are null, {', '.join(IMAGE_CONDITIONS)}"
            raise self.error(f"image_condition_type={self.image_condition_type!r}; {known}")
