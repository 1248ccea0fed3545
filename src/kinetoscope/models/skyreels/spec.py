"""The SkyReels-V2 family as data."""

from __future__ import annotations

import math
from typing import Any

from kinetoscope.core.sharding import ShardPlan
from kinetoscope.core.types import SamplingParams
from kinetoscope.diffusion.convention import Convention
from kinetoscope.models.skyreels.config import SkyReelsConfig

__all__ = [
    "CONVENTION",
    "FORCING_EXTRA",
    "FORCING_IMAGE",
    "FORCING_VIDEO",
    "NEGATIVE_PROMPT",
    "PRESETS",
    "PUBLISHED",
    "SHARDING",
    "TEXT_LENGTH",
    "SkyReelsConfig",
    "forward_flops",
]

CONVENTION = Convention(prediction="flow", interpolant="linear", timestep_scale=1000.0, default_shift=8.0)
TEXT_LENGTH = 512  # padded with zeros, which are part of what the model learned
NEGATIVE_PROMPT = (  # SkyReels-V2 repository, generate_video.py and generate_video_df.py
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, overall "
    "gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, poorly drawn hands, "
    "poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still picture, messy background, three "
    "legs, many people in the background, walking backwards"
)

FORCING_EXTRA: dict[str, Any] = {
    "overlap_history": None,  # frames of a window taken from the one before; needed beyond base_num_frames
    "addnoise_condition": 0,  # timestep in [0, 1000] to which frames taken over are noised in what the network sees
    "base_num_frames": 97,  # frames of a window: 97 for 540P, 121 for 720P
    "ar_step": 0,  # steps by which a causal block lags behind the one before; 0 moves all frames together
    "causal_block_size": None,  # latent frames of a causal block; None: as the model's configuration says
}

_SMALL = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_LARGE = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
PUBLISHED: dict[str, dict[str, Any]] = {  # transformer/config.json; what is left out is the class's default
    "DF-1.3B": {**_SMALL, "inject_sample_info": True},
    "DF-14B": _LARGE,
    "T2V-14B": _LARGE,
    "I2V-1.3B": {**_SMALL, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 1536},
    "I2V-14B": {**_LARGE, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
}


def _preset(height: int, width: int, num_frames: int, guidance: float, shift: float, **more: Any) -> SamplingParams:
    return SamplingParams(
        height=height,
        width=width,
        num_frames=num_frames,
        fps=24.0,
        num_inference_steps=50,
        guidance_scale=guidance,
        flow_shift=shift,
        scheduler="unipc",
        negative_prompt=NEGATIVE_PROMPT,
        **more,
    )


# Model cards of Skywork and diffusers' SkyReels-V2 page: 544 x 960 at 97 frames for 540P, 720 x 1280 at 121 for 720P;
# guidance 6 and shift 8 for text-to-video, 5 and 5 for image-to-video.
_540, _720 = (544, 960, 97), (720, 1280, 121)
PRESETS: dict[str, SamplingParams] = {
    "Skywork/SkyReels-V2-T2V-14B-540P-Diffusers": _preset(*_540, 6.0, 8.0),
    "Skywork/SkyReels-V2-T2V-14B-720P-Diffusers": _preset(*_720, 6.0, 8.0),
    "Skywork/SkyReels-V2-I2V-1.3B-540P-Diffusers": _preset(*_540, 5.0, 5.0),
    "Skywork/SkyReels-V2-I2V-14B-540P-Diffusers": _preset(*_540, 5.0, 5.0),
    "Skywork/SkyReels-V2-I2V-14B-720P-Diffusers": _preset(*_720, 5.0, 5.0),
    "Skywork/SkyReels-V2-DF-1.3B-540P-Diffusers": _preset(*_540, 6.0, 8.0, extra={"base_num_frames": 97}),
    "Skywork/SkyReels-V2-DF-14B-540P-Diffusers": _preset(*_540, 6.0, 8.0, extra={"base_num_frames": 97}),
    "Skywork/SkyReels-V2-DF-14B-720P-Diffusers": _preset(*_720, 6.0, 8.0, extra={"base_num_frames": 121}),
}
FORCING_IMAGE = SamplingParams(guidance_scale=5.0, flow_shift=5.0)  # diffusion forcing from an image
FORCING_VIDEO = SamplingParams(guidance_scale=5.0, flow_shift=5.0, extra={"overlap_history": 17})  # from a video


def forward_flops(config: SkyReelsConfig, tokens: int, text_tokens: int = TEXT_LENGTH) -> float:
    """Floating-point operations of one row of a forward, a multiply-add counted as two; image features not counted."""
    d, patch = config.dim, math.prod(config.patch_size)
    linear = tokens * (6 * d * d + 2 * d * config.ffn_dim) + text_tokens * 2 * d * d
    attention = 2 * tokens * d * (tokens + text_tokens)
    ends = tokens * d * patch * (config.in_channels + (config.out_channels or config.in_channels))
    return 2.0 * (config.num_layers * (linear + attention) + ends)


SHARDING = ShardPlan(
    {
        "blocks.*.to_q": "colwise",
        "blocks.*.to_k": "colwise",
        "blocks.*.to_v": "colwise",
        "blocks.*.to_out.0": "rowwise",
        "blocks.*.norm_q": "head_norm",
        "blocks.*.norm_k": "head_norm",
        "blocks.*.add_k_proj?": "colwise",
        "blocks.*.add_v_proj?": "colwise",
        "blocks.*.norm_added_k?": "head_norm",
        "blocks.*.ffn.net.0.proj": "colwise",
        "blocks.*.ffn.net.2": "rowwise",
        "blocks.*.norm2?": "whole",
        "blocks.*.scale_shift_table": "whole",
        "condition_embedder.time_embedder.*": "whole",
        "condition_embedder.time_proj": "gathered",
        "condition_embedder.text_embedder.linear_1": "colwise",
        "condition_embedder.text_embedder.linear_2": "rowwise",
        "condition_embedder.image_embedder.*?": "whole",
        "patch_embedding": "whole",
        "proj_out": "whole",
        "scale_shift_table": "whole",
        "fps_embedding?": "whole",
        "fps_projection.*?": "whole",
    },
    outside=("attn2.project", "attn2.project_image"),
)
"""How devices share the weights: heads and hidden units of the blocks, and the projections that make modulation."""
