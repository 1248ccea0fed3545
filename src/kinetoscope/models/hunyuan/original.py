"""HunyuanVideo's layers as its authors and ComfyUI name them: LoRA files have these names, published weights do not.

Names of github Tencent/HunyuanVideo (`hyvideo/modules/models.py`) and comfyanonymous/ComfyUI
(`comfy/ldm/hunyuan_video/model.py`). Both keep queries, keys and values in one layer. Left out is the modulation of the
last layer, whose halves diffusers has swapped.
"""

from __future__ import annotations

import re

from kinetoscope.nn.original_names import renamer

_rename = renamer(
    (
        (r"^img_in\.", "x_embedder."),
        (r"^txt_in\.input_embedder\.", "context_embedder.proj_in."),
        (r"^txt_in\.t_embedder\.(mlp\.0|in_layer)\.", "context_embedder.time_text_embed.timestep_embedder.linear_1."),
        (r"^txt_in\.t_embedder\.(mlp\.2|out_layer)\.", "context_embedder.time_text_embed.timestep_embedder.linear_2."),
        (r"^txt_in\.c_embedder\.(linear_1|in_layer)\.", "context_embedder.time_text_embed.text_embedder.linear_1."),
        (r"^txt_in\.c_embedder\.(linear_2|out_layer)\.", "context_embedder.time_text_embed.text_embedder.linear_2."),
        (r"^txt_in\.individual_token_refiner\.blocks\.", "context_embedder.token_refiner.refiner_blocks."),
        (r"^time_in\.(mlp\.0|in_layer)\.", "time_text_embed.timestep_embedder.linear_1."),
        (r"^time_in\.(mlp\.2|out_layer)\.", "time_text_embed.timestep_embedder.linear_2."),
        (r"^guidance_in\.(mlp\.0|in_layer)\.", "time_text_embed.guidance_embedder.linear_1."),
        (r"^guidance_in\.(mlp\.2|out_layer)\.", "time_text_embed.guidance_embedder.linear_2."),
        (r"^vector_in\.in_layer\.", "time_text_embed.text_embedder.linear_1."),
        (r"^vector_in\.out_layer\.", "time_text_embed.text_embedder.linear_2."),
        (r"^final_layer\.linear\.", "proj_out."),
        (r"^double_blocks\.", "transformer_blocks."),
        (r"^single_blocks\.", "single_transformer_blocks."),
        (r"^(transformer_blocks\.\d+)\.img_mod\.lin(ear)?\.", r"\1.norm1.linear."),
        (r"^(transformer_blocks\.\d+)\.txt_mod\.lin(ear)?\.", r"\1.norm1_context.linear."),
        (r"^(transformer_blocks\.\d+)\.img_attn[._]proj\.", r"\1.attn.to_out.0."),
        (r"^(transformer_blocks\.\d+)\.txt_attn[._]proj\.", r"\1.attn.to_add_out."),
        (r"^(transformer_blocks\.\d+)\.img_mlp\.(fc1|0)\.", r"\1.ff.net.0.proj."),
        (r"^(transformer_blocks\.\d+)\.img_mlp\.(fc2|2)\.", r"\1.ff.net.2."),
        (r"^(transformer_blocks\.\d+)\.txt_mlp\.(fc1|0)\.", r"\1.ff_context.net.0.proj."),
        (r"^(transformer_blocks\.\d+)\.txt_mlp\.(fc2|2)\.", r"\1.ff_context.net.2."),
        (r"^(single_transformer_blocks\.\d+)\.linear2\.", r"\1.proj_out."),
        (r"^(single_transformer_blocks\.\d+)\.modulation\.lin(ear)?\.", r"\1.norm.linear."),
        (r"^(.*refiner_blocks\.\d+)\.self_attn[._]proj\.", r"\1.attn.to_out.0."),
        (r"^(.*refiner_blocks\.\d+)\.mlp\.(fc1|0)\.", r"\1.ff.net.0.proj."),
        (r"^(.*refiner_blocks\.\d+)\.mlp\.(fc2|2)\.", r"\1.ff.net.2."),
        (r"^(.*refiner_blocks\.\d+)\.adaLN_modulation\.1\.", r"\1.norm_out.linear."),
    )
)
_JOINED = (  # layers of theirs that are several of ours
    (re.compile(r"^(transformer_blocks\.\d+)\.img_attn[._]qkv\."), ("attn.to_q", "attn.to_k", "attn.to_v")),
    (
        re.compile(r"^(transformer_blocks\.\d+)\.txt_attn[._]qkv\."),
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ),
    (re.compile(r"^(.*refiner_blocks\.\d+)\.self_attn[._]qkv\."), ("attn.to_q", "attn.to_k", "attn.to_v")),
    (
        re.compile(r"^(single_transformer_blocks\.\d+)\.linear1\."),
        ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    ),
)


def lora_names(key: str) -> str | tuple[str, ...]:
    """Our parameter, or the parameters that one of theirs joins; our own names stay."""
    key = _rename(key)
    for pattern, parts in _JOINED:
        if match := pattern.match(key):
            return tuple(f"{match[1]}.{part}.{key[match.end() :]}" for part in parts)
    return key
