"""The LTX-Video family as data."""

from __future__ import annotations

from typing import Any

from kinetoscope.core.sharding import ShardPlan
from kinetoscope.core.types import SamplingParams
from kinetoscope.diffusion.convention import Convention
from kinetoscope.models.ltx.config import LTXConfig

__all__ = [
    "CONVENTION",
    "EXTRA_DEFAULTS",
    "NEGATIVE_PROMPT",
    "PRESETS",
    "PUBLISHED",
    "SHARDING",
    "TEXT_LENGTH",
    "LTXConfig",
    "forward_flops",
]

CONVENTION = Convention(prediction="flow", interpolant="linear", timestep_scale=1000.0, default_shift=1.0)
TEXT_LENGTH = 128  # padding is masked out of the cross-attention
NEGATIVE_PROMPT = "worst quality, inconsistent motion, blurry, jittery, distorted"  # model card

EXTRA_DEFAULTS: dict[str, Any] = {
    "decode_timestep": 0.0,  # noise level the VAE is told, for VAEs that take one (0.9.1)
    "decode_noise_scale": None,  # noise mixed into the latents before decoding; None: as decode_timestep
}

PUBLISHED: dict[str, dict[str, Any]] = {  # transformer/config.json; what is left out is the class's default
    "2B": {},
    "13B": {"attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48},
}

_COMMON = {
    "num_frames": 161,
    "fps": 25.0,  # the pipelines' default frame_rate, to which the rotary positions are scaled
    "num_inference_steps": 50,
    "guidance_scale": 3.0,
    "negative_prompt": NEGATIVE_PROMPT,
}
# Model cards of Lightricks and diffusers' LTX-Video page.
PRESETS: dict[str, SamplingParams] = {
    "Lightricks/LTX-Video": SamplingParams(height=480, width=704, **_COMMON),
    "Lightricks/LTX-Video-0.9.1": SamplingParams(
        height=512, width=768, extra={"decode_timestep": 0.03, "decode_noise_scale": 0.025}, **_COMMON
    ),
}


def forward_flops(config: LTXConfig, tokens: int, text_tokens: int = TEXT_LENGTH) -> float:
    """Floating-point operations of one row of a forward, a multiply-add counted as two.

    Linear layers of the blocks (6 d^2 of attention and 8 d^2 of feed-forward a token), keys and values of the text,
    both products of both attentions, and the projections at both ends.
    """
    d = config.dim
    linear = tokens * 14 * d * d + text_tokens * 2 * d * d
    attention = 2 * tokens * d * (tokens + text_tokens)
    ends = tokens * d * (config.in_channels + (config.out_channels or config.in_channels))
    return 2.0 * (config.num_layers * (linear + attention) + ends)


SHARDING = ShardPlan(
    {
        "transformer_blocks.*.to_q": "colwise",
        "transformer_blocks.*.to_k": "colwise",
        "transformer_blocks.*.to_v": "colwise",
        "transformer_blocks.*.to_out.0": "rowwise",
        "transformer_blocks.*.norm_q": "head_norm",
        "transformer_blocks.*.norm_k": "head_norm",
        "transformer_blocks.*.attn1.rotate": "rotation",
        "transformer_blocks.*.ff.net.0.proj": "colwise",
        "transformer_blocks.*.ff.net.2": "rowwise",
        "transformer_blocks.*.scale_shift_table": "whole",
        "caption_projection.linear_1": "colwise",
        "caption_projection.linear_2": "rowwise",
        "time_embed.emb.*": "whole",
        "time_embed.linear": "gathered",
        "proj_in": "whole",
        "proj_out": "whole",
        "scale_shift_table": "whole",
    },
    outside=("attn2.project",),
)
"""How devices share the weights: heads and hidden units of the blocks, and the projections that make modulation."""
