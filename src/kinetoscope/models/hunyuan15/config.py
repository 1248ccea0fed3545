"""The published `transformer/config.json` of a HunyuanVideo 1.5 model, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kinetoscope.core.published import HeadedConfig


@dataclass(frozen=True, slots=True)
class HunyuanVideo15Config(HeadedConfig):
    """Sizes of a HunyuanVideo 1.5 transformer, named as in the published file (defaults are the published class's).

    Attributes:
        in_channels: of the sample, its condition and a mask: 2 C + 1.
        out_channels: latent channels C; None: as in.
        num_attention_heads, attention_head_dim: their product is the width d.
        num_layers, num_refiner_layers: blocks, and blocks of the token refiner.
        mlp_ratio: hidden width of the feed-forward layers by d.
        patch_size, patch_size_t: latent positions a token covers each way in space, and in time.
        qk_norm: normalisation of queries and keys; every published model has "rms_norm".
        text_embed_dim, text_embed_2_dim, image_embed_dim: widths of the language model, of the glyph encoder and of
            the image encoder.
        rope_theta, rope_axes_dim: base of the rotary frequencies, and channels of a head for time, height, width.
        target_size: side in pixels of a square of the area it was trained for; 640 for 480p, 960 for 720p.
        task_type: "t2v" or "i2v".
        use_meanflow: whether the next timestep is embedded too (the step-distilled models).
    """

    what: ClassVar[str] = "HunyuanVideo 1.5 transformer"
    in_channels: int = 65
    out_channels: int | None = 32
    num_attention_heads: int = 16
    attention_head_dim: int = 128
    num_layers: int = 54
    num_refiner_layers: int = 2
    mlp_ratio: float = 4.0
    patch_size: int = 1
    patch_size_t: int = 1
    qk_norm: str = "rms_norm"
    text_embed_dim: int = 3584
    text_embed_2_dim: int = 1472
    image_embed_dim: int = 1152
    rope_theta: float = 256.0
    rope_axes_dim: tuple[int, int, int] = (16, 56, 56)
    target_size: int = 640
    task_type: str = "i2v"
    use_meanflow: bool = False

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns of a token."""
        return (self.patch_size_t, self.patch_size, self.patch_size)

    @property
    def latent_channels(self) -> int:
        """Channels of the sample itself."""
        return self.out_channels or self.in_channels

    def check(self) -> None:
        """Raise ConfigError where the values do not describe a model that `HunyuanVideo15Transformer3DModel` builds."""
        HeadedConfig.check(self)
        self.require(qk_norm="rms_norm")
        self.check_rope_axes(self.rope_axes_dim)
