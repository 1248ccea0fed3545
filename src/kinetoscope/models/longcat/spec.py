"""The LongCat-Video family as data (arXiv 2510.22200; github meituan-longcat/LongCat-Video)."""

from __future__ import annotations

import math

from kinetoscope.core.sharding import ShardPlan
from kinetoscope.core.types import SamplingParams
from kinetoscope.diffusion.convention import Convention
from kinetoscope.models.longcat.config import LongCatConfig

__all__ = [
    "CONVENTION",
    "NEGATIVE_PROMPT",
    "PRESETS",
    "SHARDING",
    "TEXT_LENGTH",
    "LongCatConfig",
    "forward_flops",
]

CONVENTION = Convention(prediction="flow", sign=-1, interpolant="linear", timestep_scale=1000.0)
TEXT_LENGTH = 512  # the zeros after the caption projection are part of what the model learned
NEGATIVE_PROMPT = (  # published with the model (its demonstration scripts)
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, "
    "overall gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, "
    "poorly drawn hands, poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still picture, "
    "messy background, three legs, many people in the background, walking backwards"
)

# Sampling settings of the published model (defaults of its pipeline; 15 frames a second in its demonstration scripts).
# The shift is the directory's.
PRESETS: dict[str, SamplingParams] = {
    "meituan-longcat/LongCat-Video": SamplingParams(
        height=480,
        width=832,
        num_frames=93,
        fps=15.0,
        num_inference_steps=50,
        guidance_scale=4.0,
        negative_prompt=NEGATIVE_PROMPT,
    ),
}


def forward_flops(config: LongCatConfig, tokens: int, text_tokens: int = TEXT_LENGTH) -> float:
    """Floating-point operations of one row of a forward, a multiply-add counted as two.

    Linear layers of the blocks (4 d^2 self-attention, 2 d^2 cross-attention and 3 d ffn weights a token; 2 d^2 a text
    token), both products of both attentions, patch embedding and projection.
    """
    d, patch = config.hidden_size, math.prod(config.patch_size)
    linear = tokens * (6 * d * d + 3 * d * config.ffn_dim) + text_tokens * 2 * d * d
    attention = 2 * tokens * d * (tokens + text_tokens)
    ends = tokens * d * patch * (config.in_channels + config.out_channels)
    return 2.0 * (config.depth * (linear + attention) + ends)


SHARDING = ShardPlan(
    {
        "blocks.*.attn.qkv": "colwise:3",
        "blocks.*.attn.proj": "rowwise",
        "blocks.*.attn.*_norm": "whole",
        "blocks.*.cross_attn.q_linear": "colwise",
        "blocks.*.cross_attn.kv_linear": "colwise:2",
        "blocks.*.cross_attn.proj": "rowwise",
        "blocks.*.cross_attn.*_norm": "whole",
        "blocks.*.pre_crs_attn_norm": "whole",
        "blocks.*.adaLN_modulation.1": "gathered",
        "blocks.*.ffn.w1": "colwise",
        "blocks.*.ffn.w3": "colwise",
        "blocks.*.ffn.w2": "rowwise",
        "x_embedder.proj": "whole",
        "t_embedder.*": "whole",
        "y_embedder.y_proj.0": "colwise",
        "y_embedder.y_proj.2": "rowwise",
        "final_layer.*": "whole",
    },
    outside=("cross_attn.project", "condition"),
    roots=("prepare_conditioning", "prepare_timesteps", "prepare_shared", "cache_condition"),
)
"""How devices share the weights: heads and hidden units of the blocks, and the projections that make modulation."""
