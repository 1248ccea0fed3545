"""The Cosmos Predict family as data: Predict 1 (arXiv 2501.03575), 2 and 2.5 (arXiv 2511.00062)."""

from __future__ import annotations

import math
from typing import Any

from kinetoscope.core.sharding import ShardPlan
from kinetoscope.core.types import SamplingParams
from kinetoscope.diffusion.convention import Convention, Preconditioning
from kinetoscope.models.cosmos.config import CosmosConfig

__all__ = [
    "CONVENTION_1",
    "CONVENTION_2",
    "CONVENTION_25",
    "FLOW_OF_2",
    "NEGATIVE_PROMPT",
    "PRESETS",
    "SCHEDULE_2",
    "SHARDING",
    "SYSTEM_PROMPT_25",
    "TEXT_LENGTH",
    "CosmosConfig",
    "forward_flops",
]

CONVENTION_1 = Convention(prediction="edm", interpolant="additive", preconditioning=Preconditioning(0.5))
CONVENTION_2 = Convention(prediction="edm", interpolant="additive", preconditioning=Preconditioning(1.0, flow=True))
CONVENTION_25 = Convention(prediction="flow", interpolant="linear", timestep_scale=1.0)
FLOW_OF_2 = Convention(prediction="flow", interpolant="linear", timestep_scale=1.0)
"""Predict 2 without its scalings: its network reads x / (1 + s) at t = s / (1 + s), which is a flow's sample at t."""
TEXT_LENGTH = 512  # padded with zeros (2.5: padding tokens), which are part of what the models learned
# Predict 2's noise levels are fixed by its published pipelines, whatever the directory's scheduler says.
SCHEDULE_2: dict[str, Any] = {"sigma_min": 0.002, "sigma_max": 80.0, "final_sigmas_type": "sigma_min"}
SYSTEM_PROMPT_25 = "You are a helpful assistant who will provide prompts to an image generator."  # of the text encoder
NEGATIVE_PROMPT = (  # published with the models
    "The video captures a series of frames showing ugly scenes, static with no motion, motion blur, "
    "over-saturation, shaky footage, low resolution, grainy texture, pixelated images, poorly lit areas, "
    "underexposed and overexposed scenes, poor color balance, washed out colors, choppy sequences, "
    "jerky movements, low frame rate, artifacting, color banding, unnatural transitions, outdated special effects, "
    "fake elements, unconvincing visuals, poorly edited content, jump cuts, visual noise, and flickering. "
    "Overall, the video is of poor quality."
)

_1 = SamplingParams(704, 1280, 121, 30.0, 36, 7.0, negative_prompt=NEGATIVE_PROMPT)
_2_IMAGE = SamplingParams(768, 1360, 1, 16.0, 35, 7.0, negative_prompt=NEGATIVE_PROMPT)
_2 = SamplingParams(704, 1280, 93, 16.0, 35, 7.0, negative_prompt=NEGATIVE_PROMPT)
_25 = SamplingParams(704, 1280, 93, 16.0, 36, 7.0, negative_prompt=NEGATIVE_PROMPT)

# Sampling settings of the published models: the defaults of diffusers' Cosmos pipelines (0.42). Predict 2.5's example
# writes 16 frames a second; its network is not told.
PRESETS: dict[str, SamplingParams] = {
    "nvidia/Cosmos-1.0-Diffusion-7B-Text2World": _1,
    "nvidia/Cosmos-1.0-Diffusion-14B-Text2World": _1,
    "nvidia/Cosmos-1.0-Diffusion-7B-Video2World": _1,
    "nvidia/Cosmos-1.0-Diffusion-14B-Video2World": _1,
    "nvidia/Cosmos-Predict2-2B-Text2Image": _2_IMAGE,
    "nvidia/Cosmos-Predict2-14B-Text2Image": _2_IMAGE,
    "nvidia/Cosmos-Predict2-2B-Video2World": _2,
    "nvidia/Cosmos-Predict2-14B-Video2World": _2,
    "nvidia/Cosmos-Predict2.5-2B": _25,
    "nvidia/Cosmos-Predict2.5-14B": _25,
}


def forward_flops(config: CosmosConfig, tokens: int, text_tokens: int = TEXT_LENGTH) -> float:
    """Floating-point operations of one row of a forward, a multiply-add counted as two.

    Linear layers of the blocks (4 d^2 of self-attention, 2 d^2 of cross-attention and 2 d^2 mlp_ratio of feed-forward a
    token), keys and values of the text, both products of both attentions, the projections at both ends and of the text.
    """
    d, patch = config.dim, math.prod(config.patch_size)
    linear = tokens * d * d * (6 + 2 * config.mlp_ratio) + text_tokens * 2 * d * config.text_embed_dim
    attention = 2 * tokens * d * (tokens + text_tokens)
    ends = tokens * d * patch * (config.in_channels + config.concat_padding_mask + config.out_channels)
    if config.use_crossattn_projection:
        ends += text_tokens * config.crossattn_proj_in_channels * config.text_embed_dim
    return 2.0 * (config.num_layers * (linear + attention) + ends)


SHARDING = ShardPlan(
    {
        "transformer_blocks.*.to_q": "colwise",
        "transformer_blocks.*.to_k": "colwise",
        "transformer_blocks.*.to_v": "colwise",
        "transformer_blocks.*.to_out.0": "rowwise",
        "transformer_blocks.*.norm_q": "whole",
        "transformer_blocks.*.norm_k": "whole",
        "transformer_blocks.*.norm*.linear_1": "whole",
        "transformer_blocks.*.norm*.linear_2": "gathered",
        "transformer_blocks.*.ff.net.0.proj": "colwise",
        "transformer_blocks.*.ff.net.2": "rowwise",
        "time_embed.t_embedder.linear_1": "whole",
        "time_embed.t_embedder.linear_2": "gathered",
        "time_embed.norm": "whole",
        "patch_embed.proj": "whole",
        "learnable_pos_embed?": "whole",
        "norm_out.*": "whole",
        "proj_out": "whole",
        "crossattn_proj.*?": "whole",
    },
    outside=("attn2.project", "modulation"),
    twice=True,
)
"""How devices share the weights: heads and hidden units of the blocks, and the projections that make modulation."""
