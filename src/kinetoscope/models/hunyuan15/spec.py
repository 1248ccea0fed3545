"""The HunyuanVideo 1.5 family as data."""

from __future__ import annotations

import math
from dataclasses import replace

from kinetoscope.core.sharding import ShardPlan
from kinetoscope.core.types import SamplingParams
from kinetoscope.diffusion.convention import Convention
from kinetoscope.models.hunyuan15.config import HunyuanVideo15Config

__all__ = [
    "CONVENTION",
    "GLYPH_LENGTH",
    "HIDDEN_STATE",
    "PRESETS",
    "SHARDING",
    "SYSTEM_MESSAGE",
    "TEMPLATE_TOKENS",
    "TEXT_LENGTH",
    "HunyuanVideo15Config",
    "forward_flops",
]

CONVENTION = Convention(prediction="flow", interpolant="linear", timestep_scale=1000.0, default_shift=5.0)
TEXT_LENGTH = 1000  # text is masked for real
GLYPH_LENGTH = 256
HIDDEN_STATE = -3  # of the language model: the last but two

# What the language model is told before the prompt, with the published runs of spaces; its tokens are cropped.
_GAP = " " * 8
SYSTEM_MESSAGE = (
    "You are a helpful assistant. Describe the video by detailing the following aspects: "
    f"{_GAP}1. The main content and theme of the video. "
    f"{_GAP}2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects. "
    f"{_GAP}3. Actions, events, behaviors temporal relationships, physical movement changes of the objects. "
    f"{_GAP}4. background environment, light, style and atmosphere. "
    f"{_GAP}5. camera angles, movements, and transitions used in the video."
)
TEMPLATE_TOKENS = 108

# Sampling settings of the published models (HunyuanVideo-1.5 repository, "Optimal Inference Configurations"; sizes are
# 16:9 at the area of `target_size`).
_480P = SamplingParams(
    height=480,
    width=848,
    num_frames=121,
    fps=24.0,
    num_inference_steps=50,
    guidance_scale=6.0,
    flow_shift=5.0,
    scheduler="euler",
)
_720P = replace(_480P, height=720, width=1280)
_NAME = "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-"
PRESETS: dict[str, SamplingParams] = {
    _NAME + "480p_t2v": _480P,
    _NAME + "480p_i2v": _480P,
    _NAME + "720p_t2v": replace(_720P, flow_shift=9.0),
    _NAME + "720p_i2v": replace(_720P, flow_shift=7.0),
    _NAME + "480p_t2v_distilled": replace(_480P, guidance_scale=1.0),
    _NAME + "480p_i2v_distilled": replace(_480P, guidance_scale=1.0),
    _NAME + "480p_i2v_step_distilled": replace(_480P, guidance_scale=1.0, flow_shift=7.0, num_inference_steps=12),
    _NAME + "720p_i2v_distilled": replace(_720P, guidance_scale=1.0, flow_shift=7.0),
}


def forward_flops(config: HunyuanVideo15Config, tokens: int, text_tokens: int = TEXT_LENGTH) -> float:
    """Floating-point operations of one row of a forward, a multiply-add counted as two.

    Every block has (4 + 2 mlp_ratio) d^2 weights a token of either stream and attends over both; patch embedding and
    projection at the ends. The refiner is left out.
    """
    d, patch, length = config.dim, math.prod(config.patch), tokens + text_tokens
    block = length * (4 + 2 * config.mlp_ratio) * d * d + 2 * length * length * d
    ends = tokens * d * patch * (config.in_channels + config.latent_channels)
    return 2.0 * (config.num_layers * block + ends)


SHARDING = ShardPlan(
    {
        "transformer_blocks.*.attn.to_q": "colwise",
        "transformer_blocks.*.attn.to_k": "colwise",
        "transformer_blocks.*.attn.to_v": "colwise",
        "transformer_blocks.*.attn.add_q_proj": "colwise",
        "transformer_blocks.*.attn.add_k_proj": "colwise",
        "transformer_blocks.*.attn.add_v_proj": "colwise",
        "transformer_blocks.*.attn.to_out.0": "rowwise",
        "transformer_blocks.*.attn.to_add_out": "rowwise",
        "transformer_blocks.*.attn.norm_*": "whole",
        "transformer_blocks.*.norm1.linear": "gathered",
        "transformer_blocks.*.norm1_context.linear": "gathered",
        "transformer_blocks.*.ff.net.0.proj": "colwise",
        "transformer_blocks.*.ff.net.2": "rowwise",
        "transformer_blocks.*.ff_context.net.0.proj": "colwise",
        "transformer_blocks.*.ff_context.net.2": "rowwise",
        "context_embedder.token_refiner.refiner_blocks.*.attn.to_q": "colwise",
        "context_embedder.token_refiner.refiner_blocks.*.attn.to_k": "colwise",
        "context_embedder.token_refiner.refiner_blocks.*.attn.to_v": "colwise",
        "context_embedder.token_refiner.refiner_blocks.*.attn.to_out.0": "rowwise",
        "context_embedder.token_refiner.refiner_blocks.*.ff.net.0.proj": "colwise",
        "context_embedder.token_refiner.refiner_blocks.*.ff.net.2": "rowwise",
        "context_embedder.token_refiner.refiner_blocks.*.norm1": "whole",
        "context_embedder.token_refiner.refiner_blocks.*.norm2": "whole",
        "context_embedder.token_refiner.refiner_blocks.*.norm_out.linear": "gathered",
        "context_embedder.proj_in": "whole",
        "context_embedder.time_text_embed.*": "whole",
        "context_embedder_2.norm": "whole",
        "context_embedder_2.linear_1": "colwise",
        "context_embedder_2.linear_2": "rowwise",
        "context_embedder_2.linear_3": "gathered",
        "image_embedder.*": "whole",
        "time_embed.*": "whole",
        "cond_type_embed": "whole",
        "x_embedder.proj": "whole",
        "norm_out.linear": "gathered",
        "proj_out": "whole",
    },
    outside=(),
)
"""How devices share the weights: heads and hidden units of the blocks, and the projections that make modulation."""
