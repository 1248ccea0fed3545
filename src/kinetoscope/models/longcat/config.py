"""The published `dit/config.json` of LongCat-Video, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from kinetoscope.core.published import PublishedConfig, read_published

EXECUTION = ("enable_flashattn2", "enable_flashattn3", "enable_xformers", "enable_bsa", "bsa_params", "cp_split_hw")
"""Fields of the published file that say how to compute, not what: here that is asked of `ExecutionArgs`."""


@dataclass(frozen=True, slots=True)
class LongCatConfig(PublishedConfig):
    """Sizes of a LongCat-Video transformer, named as in the published file (defaults: the 13.6B model).

    Attributes:
        in_channels, out_channels: latent channels in and out.
        hidden_size: width d.
        depth: number of blocks.
        num_heads: attention heads of d / num_heads channels.
        caption_channels: width of the text encoder.
        mlp_ratio: the gated feed-forward layer is `ffn_dim` wide, some 2/3 of mlp_ratio d.
        adaln_tembed_dim: width of the timestep embedding.
        frequency_embedding_size: width of the sinusoidal embedding below it.
        patch_size: latent frames (always 1), rows and columns a token covers.
        text_tokens_zero_pad: text tokens beyond the true length are zeros that attention sees; False: they are masked.
    """

    what: ClassVar[str] = "LongCat transformer"
    in_channels: int = 16
    out_channels: int = 16
    hidden_size: int = 4096
    depth: int = 48
    num_heads: int = 32
    caption_channels: int = 4096
    mlp_ratio: int = 4
    adaln_tembed_dim: int = 512
    frequency_embedding_size: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    text_tokens_zero_pad: bool = True

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.hidden_size // self.num_heads

    @property
    def ffn_dim(self) -> int:
        """Hidden width of the feed-forward layers: 2/3 of mlp_ratio d, rounded up to 256."""
        return -(-(2 * self.hidden_size * self.mlp_ratio // 3) // 256) * 256

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> LongCatConfig:
        """Read a parsed `config.json`; bookkeeping and the fields in `EXECUTION` are skipped.

        A field that is left out has the published class's default, which for `text_tokens_zero_pad` is False.

        Raises:
            ConfigError: unknown field, value of the wrong kind, or sizes that do not fit together.
        """
        known = {k: v for k, v in config.items() if k not in EXECUTION}
        result = read_published(cls, {"text_tokens_zero_pad": False, **known}, cls.what)
        result.check()
        return result

    def check(self) -> None:
        """Raise ConfigError where the values describe no model."""
        PublishedConfig.check(self)
        if self.hidden_size % self.num_heads or self.head_dim % 8:
            raise self.error(
                f"hidden_size={self.hidden_size} should be num_heads={self.num_heads} times "
                "a multiple of 8 (three rotary axes)"
            )
        if self.frequency_embedding_size % 2:
            raise self.error("frequency_embedding_size should be even")
        if self.patch_size[0] != 1:
            raise self.error(f"patch_size={self.patch_size} should start with 1 (a timestep a latent frame)")
