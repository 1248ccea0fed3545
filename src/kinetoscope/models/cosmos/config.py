"""The published `transformer/config.json` of a Cosmos Predict model, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from kinetoscope.core.published import HeadedConfig, read_published


@dataclass(frozen=True, slots=True)
class CosmosConfig(HeadedConfig):
    """Sizes of a Cosmos transformer, named as in the published file (defaults are the published class's).

    Attributes:
        in_channels: latent channels in, plus 1 where the model reads a mask of condition frames (video-to-world).
        out_channels: latent channels out.
        num_attention_heads, attention_head_dim: their product is the width d.
        num_layers: number of blocks.
        mlp_ratio: hidden width of the feed-forward layers over d.
        text_embed_dim: width of the text that cross-attention reads.
        adaln_lora_dim: rank of the modulation layers.
        max_size: largest latent (T, H, W).
        patch_size: latent frames, rows and columns a token covers.
        rope_scale: stretch of the rotary positions along (T, H, W).
        concat_padding_mask: whether a mask of padded pixels is one more input channel (not counted in `in_channels`).
        extra_pos_embed_type: "learnable": every block adds learned positions (Predict 1); None: rotary ones alone.
        use_crossattn_projection: whether text is first projected to `encoder_hidden_states_channels` (Predict 2.5).
        crossattn_proj_in_channels: width of the text encoder's features where it is.
        encoder_hidden_states_channels: width after that projection; equals `text_embed_dim`.
        controlnet_block_every_n, img_context_dim_in: of Cosmos Transfer, which is not built here; None.
        img_context_num_tokens, img_context_dim_out: of Cosmos Transfer; not read.
    """

    what: ClassVar[str] = "Cosmos transformer"
    in_channels: int = 16
    out_channels: int = 16
    num_attention_heads: int = 32
    attention_head_dim: int = 128
    num_layers: int = 28
    mlp_ratio: float = 4.0
    text_embed_dim: int = 1024
    adaln_lora_dim: int = 256
    max_size: tuple[int, int, int] = (128, 240, 240)
    patch_size: tuple[int, int, int] = (1, 2, 2)
    rope_scale: tuple[float, float, float] = (2.0, 1.0, 1.0)
    concat_padding_mask: bool = True
    extra_pos_embed_type: str | None = "learnable"
    use_crossattn_projection: bool = False
    crossattn_proj_in_channels: int = 1024
    encoder_hidden_states_channels: int = 1024
    controlnet_block_every_n: int | None = None
    img_context_dim_in: int | None = None
    img_context_num_tokens: int = 256
    img_context_dim_out: int = 2048

    @property
    def max_tokens(self) -> tuple[int, int, int]:
        """Largest number of tokens along (T, H, W)."""
        t, h, w = (size // patch for size, patch in zip(self.max_size, self.patch_size, strict=True))
        return t, h, w

    @property
    def reads_condition_mask(self) -> bool:
        """Whether one input channel says which latent frames are given (video-to-world)."""
        return self.in_channels == self.out_channels + 1

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> CosmosConfig:
        """Read a parsed `config.json`; fields that begin with an underscore are diffusers' bookkeeping and are skipped.

        Raises:
            ConfigError: unknown field, value of the wrong kind, or a variant this class does not build.
        """
        rest = {name: value for name, value in config.items() if name != "rope_scale"}
        result = read_published(cls, rest, cls.what)
        if "rope_scale" in config:
            result = replace(result, rope_scale=_scales(config["rope_scale"]))
        result.check()
        return result

    def check(self) -> None:
        """Raise ConfigError where the values do not describe a model that `CosmosTransformer3DModel` builds."""
        HeadedConfig.check(self)
        self.check_rope_pairs(12)
        if self.extra_pos_embed_type not in (None, "learnable"):
            raise self.error(f"extra_pos_embed_type={self.extra_pos_embed_type!r}; known are None and 'learnable'")
        if self.use_crossattn_projection and self.encoder_hidden_states_channels != self.text_embed_dim:
            raise self.error(
                f"encoder_hidden_states_channels={self.encoder_hidden_states_channels} should equal "
                f"text_embed_dim={self.text_embed_dim}, which cross-attention reads"
            )
        for name in ("controlnet_block_every_n", "img_context_dim_in"):
            if getattr(self, name) is not None:
                raise self.error(
                    f"{name}={getattr(self, name)} describes Cosmos Transfer; only Cosmos Predict is supported"
                )


def _scales(value: Any) -> tuple[float, float, float]:
    values: list[Any] = list(value) if isinstance(value, (list, tuple)) else []
    if len(values) != 3 or not all(type(v) in (int, float) and v > 0 for v in values):
        raise CosmosConfig.error(f"rope_scale={value!r} should be three positive numbers")
    return float(values[0]), float(values[1]), float(values[2])
