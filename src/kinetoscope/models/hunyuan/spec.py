"""The HunyuanVideo family as data."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from kinetoscope.core.sharding import ShardPlan
from kinetoscope.core.types import SamplingParams
from kinetoscope.diffusion.convention import Convention
from kinetoscope.models.hunyuan.config import HunyuanVideoConfig

__all__ = [
    "ANSWER_HEADER",
    "CLIP_LENGTH",
    "CONVENTION",
    "EXTRA_DEFAULTS",
    "HEADER_END",
    "HIDDEN_STATE",
    "IMAGE_STRIDE",
    "IMAGE_TEMPLATE",
    "IMAGE_TEMPLATE_TOKENS",
    "IMAGE_TOKENS",
    "NEGATIVE_IMAGE_STRIDE",
    "NOISE_SHARE",
    "PRESETS",
    "SHARDING",
    "TEMPLATE",
    "TEMPLATE_TOKENS",
    "TEXT_LENGTH",
    "HunyuanVideoConfig",
    "forward_flops",
]

CONVENTION = Convention(prediction="flow", interpolant="linear", timestep_scale=1000.0, default_shift=7.0)
TEXT_LENGTH = 256  # text is masked for real
CLIP_LENGTH = 77
HIDDEN_STATE = -3  # of the language model: the last but two

# What the language model reads around the prompt; its tokens before the prompt are cropped (published constants).
_ASPECTS = (
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
)
TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
    + _ASPECTS
    + "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)
TEMPLATE_TOKENS = 95
IMAGE_TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\n<image>\nDescribe the video by detailing the following aspects "
    "according to the reference image: " + _ASPECTS + "\n\n<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
IMAGE_TEMPLATE_TOKENS = 103
IMAGE_TOKENS = 576  # of the language model's vision tower, in place of the one "<image>"
HEADER_END = "<|end_header_id|>"
ANSWER_HEADER = 4  # tokens from the prompt's end mark to the last header's end, which are cropped too
IMAGE_STRIDE = {"latent_concat": 2, "token_replace": 4}  # every which image token the transformer reads
NEGATIVE_IMAGE_STRIDE = 2  # the published pipeline's default, which its unconditional rows get for either kind
NOISE_SHARE = 0.999  # of noise in the start; the rest is the image's latents, in every frame

EXTRA_DEFAULTS: dict[str, Any] = {"true_cfg_scale": 1.0}  # classifier-free guidance on top of the embedded one

# Sampling settings of the published models (model cards; shift from the published scheduler_config.json; FastHunyuan
# from its card: 6 distilled steps at shift 17).
_T2V = SamplingParams(
    height=720,
    width=1280,
    num_frames=129,
    fps=24.0,
    num_inference_steps=50,
    guidance_scale=6.0,
    flow_shift=7.0,
    scheduler="euler",
)
PRESETS: dict[str, SamplingParams] = {
    "hunyuanvideo-community/HunyuanVideo": _T2V,
    "FastVideo/FastHunyuan-diffusers": replace(_T2V, num_frames=125, num_inference_steps=6, flow_shift=17.0),
    "hunyuanvideo-community/HunyuanVideo-I2V": _T2V,
    "hunyuanvideo-community/HunyuanVideo-I2V-33ch": replace(_T2V, guidance_scale=1.0),
}


def forward_flops(config: HunyuanVideoConfig, tokens: int, text_tokens: int = TEXT_LENGTH) -> float:
    """Floating-point operations of one row of a forward, a multiply-add counted as two.

    Both kinds of block have (4 + 2 mlp_ratio) d^2 weights a token of video or text and attend over both; patch
    embedding and projection at the ends. The refiner is left out (256 tokens through two blocks).
    """
    d, patch, length = config.dim, math.prod(config.patch), tokens + text_tokens
    block = length * (4 + 2 * config.mlp_ratio) * d * d + 2 * length * length * d
    ends = tokens * d * patch * (config.in_channels + (config.out_channels or config.in_channels))
    return 2.0 * ((config.num_layers + config.num_single_layers) * block + ends)


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
        "single_transformer_blocks.*.attn.to_q": "colwise",
        "single_transformer_blocks.*.attn.to_k": "colwise",
        "single_transformer_blocks.*.attn.to_v": "colwise",
        "single_transformer_blocks.*.attn.norm_*": "whole",
        "single_transformer_blocks.*.norm.linear": "gathered",
        # attention and hidden units side by side, the latter four times as wide
        "single_transformer_blocks.*.proj_mlp": "colwise:4",
        "single_transformer_blocks.*.proj_out": "rowwise:5",
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
        "time_text_embed.*": "whole",
        "x_embedder.proj": "whole",
        "norm_out.linear": "gathered",
        "proj_out": "whole",
    },
    outside=(),
)
"""How devices share the weights: heads and hidden units of the blocks, and the projections that make modulation."""
