"""Wan transformers as their authors publish them, before diffusers' names (Wan2.1-Fun exists under these alone).

`config.json` and tensor names of github Wan-Video/Wan2.1 (`wan/modules/model.py`) and aigc-apps/VideoX-Fun
(`videox_fun/models/wan_transformer3d.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kinetoscope.core.errors import ConfigError
from kinetoscope.models.wan.config import WanConfig
from kinetoscope.nn.original_names import VIDEO_TRANSFORMER, renamer

IMAGE_DIM = 1280
"""Width of the image encoder's features, a literal in the published module."""
SAME = (
    "patch_size", "text_dim", "freq_dim", "ffn_dim", "num_layers", "cross_attn_norm", "eps", "add_control_adapter",
    "in_dim_control_adapter", "downscale_factor_control_adapter", "add_ref_conv", "in_dim_ref_conv",
)  # fmt: skip
UNREAD = ("text_len", "in_channels", "hidden_size", "cross_attn_type", "model_type")

rename = renamer(VIDEO_TRANSFORMER)
"""Our name of a published tensor; diffusers' names stay."""


def read_config(config: Mapping[str, Any]) -> WanConfig:
    """A parsed `config.json` of either kind.

    Raises:
        ConfigError: see `WanConfig.from_dict`; or window attention, or a norm that no published model has.
    """
    if "num_heads" not in config:
        return WanConfig.from_dict(config)
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    ours = {name: given.pop(name) for name in SAME if name in given}
    dim, heads = given.pop("dim", 2048), given.pop("num_heads")
    if type(dim) is not int or type(heads) is not int or heads < 1 or dim % heads:
        raise ConfigError(f"Wan transformer config: dim={dim!r} should be a multiple of num_heads={heads!r}")
    if tuple(given.pop("window_size", (-1, -1))) != (-1, -1) or given.pop("qk_norm", True) is not True:
        raise ConfigError("Wan transformer config: only window_size=[-1, -1] and qk_norm=true exist")
    ours |= {"num_attention_heads": heads, "attention_head_dim": dim // heads}
    ours |= {"in_channels": given.pop("in_dim", 16), "out_channels": given.pop("out_dim", 16)}
    if given.get("model_type") == "i2v" and given.get("cross_attn_type", "i2v_cross_attn") in (None, "i2v_cross_attn"):
        ours |= {"image_dim": IMAGE_DIM, "added_kv_proj_dim": dim}
    given = {name: value for name, value in given.items() if name not in UNREAD}
    return WanConfig.from_dict({**ours, **given})
