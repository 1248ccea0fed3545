"""The published `transformer/config.json` of a HunyuanVideo 1.5 model, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kinetoscope.core.errors import ConfigError
from kinetoscope.core.published import read_published, require_positive

WHAT = "HunyuanVideo 1.5 transformer"


@dataclass(frozen=True, slots=True)
class HunyuanVideo15Config:
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
    def dim(self) -> int:
        """Width d of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns of a token."""
        return (self.patch_size_t, self.patch_size, self.patch_size)

    @property
    def latent_channels(self) -> int:
        """Channels of the sample itself."""
        return self.out_channels or self.in_channels

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> HunyuanVideo15Config:
        """Read a parsed `config.json`.

        Raises:
            ConfigError: unknown field, value of the wrong kind, or a variant this class does not build.
        """
        result = read_published(cls, config, WHAT)
        result.check()
        return result

    def check(self) -> None:
        """Raise ConfigError where the values do not describe a model that `HunyuanVideo15Transformer3DModel` builds."""
        require_positive(self, WHAT)
        if self.qk_norm != "rms_norm":
            raise ConfigError(f"{WHAT} config: qk_norm={self.qk_norm!r}; only 'rms_norm' exists")
        if sum(self.rope_axes_dim) != self.attention_head_dim or any(d % 2 for d in self.rope_axes_dim):
            raise ConfigError(
                f"{WHAT} config: rope_axes_dim={self.rope_axes_dim} should be even and add up to "
                f"attention_head_dim={self.attention_head_dim}"
            )
