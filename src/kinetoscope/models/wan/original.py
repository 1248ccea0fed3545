"""Wan transformers as their authors publish them, before diffusers' names (Wan2.1-Fun exists under these alone).

`config.json` and tensor names of github Wan-Video/Wan2.1 (`wan/modules/model.py`) and aigc-apps/VideoX-Fun
(`videox_fun/models/wan_transformer3d.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kinetoscope.core.errors import ConfigError
from kinetoscope.models.wan.config import WanConfig

IMAGE_DIM = 1280
"""Width of the image encoder's features, a literal in the published module."""
SAME = (
    "patch_size", "text_dim", "freq_dim", "ffn_dim", "num_layers", "cross_attn_norm", "eps", "add_control_adapter",
    "in_dim_control_adapter", "downscale_factor_control_adapter", "add_ref_conv", "in_dim_ref_conv",
)  # fmt: skip
UNREAD = ("text_len", "in_channels", "hidden_size", "cross_attn_type", "model_type")

_PARTS = (  # published -> diffusers' and ours, applied one after the other
    (r"^patch_embedding\.", "patch_embedding."),
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^img_emb\.proj\.0\.", "condition_embedder.image_embedder.norm1."),
    (r"^img_emb\.proj\.1\.", "condition_embedder.image_embedder.ff.net.0.proj."),
    (r"^img_emb\.proj\.3\.", "condition_embedder.image_embedder.ff.net.2."),
    (r"^img_emb\.proj\.4\.", "condition_embedder.image_embedder.norm2."),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"^head\.head\.", "proj_out."),
    (r"^(blocks\.\d+)\.modulation$", r"\1.scale_shift_table"),
    (r"^(blocks\.\d+)\.norm3\.", r"\1.norm2."),  # diffusers counts the norms in the order of use
    (r"^(blocks\.\d+)\.ffn\.0\.", r"\1.ffn.net.0.proj."),
    (r"^(blocks\.\d+)\.ffn\.2\.", r"\1.ffn.net.2."),
    (r"^(blocks\.\d+)\.self_attn\.", r"\1.attn1."),
    (r"^(blocks\.\d+)\.cross_attn\.", r"\1.attn2."),
    (r"^(blocks\.\d+\.attn\d)\.norm_k_img\.", r"\1.norm_added_k."),
    (r"^(blocks\.\d+\.attn\d)\.([kv])_img\.", r"\1.add_\2_proj."),
    (r"^(blocks\.\d+\.attn\d)\.([qkv])\.", r"\1.to_\2."),
    (r"^(blocks\.\d+\.attn\d)\.o\.", r"\1.to_out.0."),
)


def rename(key: str) -> str:
    """Our name of a published tensor; diffusers' names stay."""
    for pattern, ours in _PARTS:
        key = re.sub(pattern, ours, key)
    return key


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
