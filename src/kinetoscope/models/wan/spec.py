"""The Wan 2.1 and 2.2 family as data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from kinetoscope.core.sharding import ShardPlan
from kinetoscope.core.types import SamplingParams
from kinetoscope.diffusion.convention import Convention
from kinetoscope.models.wan.config import WanConfig

__all__ = [
    "CONVENTION",
    "FUN_CAMERA",
    "FUN_CONTROL",
    "FUN_PRESETS",
    "NEGATIVE_PROMPT",
    "PRESETS",
    "SHARDING",
    "TEACACHE",
    "TEXT_LENGTH",
    "WanConfig",
    "forward_flops",
    "nearest_preset",
    "teacache_coefficients",
]

CONVENTION = Convention(prediction="flow", interpolant="linear", timestep_scale=1000.0, default_shift=3.0)
TEXT_LENGTH = 512  # padded with zeros, which are part of what the model learned
NEGATIVE_PROMPT = (  # published with the model (Wan2.1 repository, shared configuration)
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)


def _preset(size: tuple[int, int], **values: Any) -> SamplingParams:
    common: dict[str, Any] = {"num_frames": 81, "fps": 16.0, "num_inference_steps": 50, "scheduler": "unipc"}
    return SamplingParams(height=size[0], width=size[1], **common | values)


_480P, _720P = (480, 832), (720, 1280)

# Sampling settings of the published models: their cards; shift 3 for 480p and 5 for 720p by diffusers' Wan page; of
# Wan 2.2 by its repository
# configurations (boundary, shift and both guidance scales of each model).
PRESETS: dict[str, SamplingParams] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _preset(_480P, guidance_scale=5.0, flow_shift=3.0),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": _preset(_720P, guidance_scale=5.0, flow_shift=5.0),
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": _preset(_480P, guidance_scale=5.0, flow_shift=3.0),
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": _preset(_720P, guidance_scale=5.0, flow_shift=5.0),
    "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers": _preset(_720P, guidance_scale=5.5, flow_shift=16.0),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": _preset(
        _720P, num_inference_steps=40, guidance_scale=4.0, guidance_scale_2=3.0, flow_shift=12.0
    ),
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": _preset(
        _720P, num_inference_steps=40, guidance_scale=3.5, guidance_scale_2=3.5, flow_shift=5.0
    ),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": _preset(
        (704, 1280), num_frames=121, fps=24.0, guidance_scale=5.0, flow_shift=5.0
    ),
}

# Wan2.1-Fun. The first is github hao-ai-lab/FastVideo's preset wan_fun_1_3b_control with its 480p configuration (August
# 2026). The others are published as a transformer in its authors' names (see `original`) beside checkpoints of other
# kinds: the transformer, in a directory with the other parts of a Wan 2.1 image-to-video model, runs with the settings
# of aigc-apps/VideoX-Fun's examples/wan2.1_fun (sampler "Flow", whose shift is config/wan2.1/wan_civitai.yaml's).
FUN_CAMERA = "alibaba-pai/Wan2.1-Fun-V1.1-1.3B-Control-Camera"
FUN_CONTROL = "IRMChen/Wan2.1-Fun-1.3B-Control-Diffusers"
_FUN: dict[str, Any] = {"guidance_scale": 6.0, "flow_shift": 5.0, "scheduler": "euler"}
_FUN_CONTROL = _preset((832, 480), num_frames=49, **_FUN)
FUN_PRESETS: dict[str, SamplingParams] = {
    FUN_CONTROL: _preset((832, 480), num_frames=49, guidance_scale=6.0, flow_shift=3.0),
    "alibaba-pai/Wan2.1-Fun-1.3B-Control": _FUN_CONTROL,
    "alibaba-pai/Wan2.1-Fun-14B-Control": _FUN_CONTROL,
    "alibaba-pai/Wan2.1-Fun-V1.1-1.3B-Control": _FUN_CONTROL,
    "alibaba-pai/Wan2.1-Fun-V1.1-14B-Control": _FUN_CONTROL,
    FUN_CAMERA: _preset(_480P, **_FUN),
    "alibaba-pai/Wan2.1-Fun-V1.1-14B-Control-Camera": _preset(_480P, **_FUN),
}


# TeaCache's polynomials on the projected time embedding ("retention" mode), highest power first: github
# ali-vilab/TeaCache, TeaCache4Wan2.1/teacache_generate.py. Of the networks named and no others.
TEACACHE: dict[str, tuple[float, ...]] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": (
        -5.21862437e04, 9.23041404e03, -5.28275948e02, 1.36987616e01, -4.99875664e-02
    ),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": (
        -3.03318725e05, 4.90537029e04, -2.65530556e03, 5.87365115e01, -3.15583525e-01
    ),
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": (
        2.57151496e05, -3.54229917e04, 1.40286849e03, -1.35890334e01, 1.32517977e-01
    ),
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": (
        8.10705460e03, 2.13393892e03, -3.72934672e02, 1.66203073e01, -4.17769401e-02
    ),
}  # fmt: skip


def teacache_coefficients(name: str, config: WanConfig) -> tuple[float, ...] | None:
    """The published polynomial of a model, by its name or, where only one model has them, by its sizes."""
    if name in TEACACHE or config.in_channels != 16 or config.out_channels != 16:
        return TEACACHE.get(name)
    sizes = {(1536, 8960, 30): "T2V-1.3B", (5120, 13824, 40): "T2V-14B"}
    known = sizes.get((config.dim, config.ffn_dim, config.num_layers))
    return None if known is None else TEACACHE[f"Wan-AI/Wan2.1-{known}-Diffusers"]


def nearest_preset(config: WanConfig, index: Mapping[str, Any]) -> str:
    """The published model that a directory is like, by its sizes and its model_index.json: whose defaults it gets."""
    if index.get("expand_timesteps"):
        return "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
    control = index.get("_class_name") in ("WanVideoToVideoPipeline", "WanFunControlPipeline")
    if control and config.in_channels > config.out_channels:
        return FUN_CAMERA if config.add_control_adapter else FUN_CONTROL
    image = index.get("_class_name") == "WanImageToVideoPipeline"
    if index.get("boundary_ratio") is not None:
        return f"Wan-AI/Wan2.2-{'I2V' if image else 'T2V'}-A14B-Diffusers"
    if config.pos_embed_seq_len is not None:
        return "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers"
    if image:
        return "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"
    return f"Wan-AI/Wan2.1-T2V-{'14B' if config.num_layers >= 40 else '1.3B'}-Diffusers"


def forward_flops(config: WanConfig, tokens: int, text_tokens: int = TEXT_LENGTH) -> float:
    """Floating-point operations of one row of a forward, a multiply-add counted as two.

    Linear layers of the blocks (6 d^2 + 2 d ffn weights a token: self-attention 4 d^2, cross-attention 2 d^2), keys and
    values of the text (2 d^2 a text token), both products of both attentions, patch embedding and projection. The 1.3B
    model at 32,760 tokens comes to 0.28 PFLOP.
    """
    d, patch = config.dim, math.prod(config.patch_size)
    linear = tokens * (6 * d * d + 2 * d * config.ffn_dim) + text_tokens * 2 * d * d
    attention = 2 * tokens * d * (tokens + text_tokens)
    ends = tokens * d * patch * (config.in_channels + config.out_channels)
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
        "blocks.*.to_gate_compress?": "colwise",
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
        "control_adapter.*?": "whole",
        "ref_conv?": "whole",
    },
    outside=("attn2.project", "attn2.project_image"),
)
"""How devices share the weights: heads and hidden units of the blocks, and the projections that make modulation."""
