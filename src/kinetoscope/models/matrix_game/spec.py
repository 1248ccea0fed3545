"""The Matrix-Game 2 family as data."""

from __future__ import annotations

import math
from dataclasses import replace

from kinetoscope.core.sharding import ShardPlan
from kinetoscope.core.types import SamplingParams
from kinetoscope.diffusion.convention import Convention
from kinetoscope.models.matrix_game.config import MatrixGameConfig
from kinetoscope.nn.original_names import VIDEO_TRANSFORMER, renamer

CONVENTION = Convention(prediction="flow", interpolant="linear", timestep_scale=1000.0, default_shift=5.0)
IMAGE_TOKENS = 257  # CLIP ViT-H/14 at 224 pixels: a class token and 16 x 16 patches
IMAGE_SIZE = 224

rename = renamer([(r"^model\.", ""), (r"^patch_embedding\.proj\.", "patch_embedding."), *VIDEO_TRANSFORMER])
"""Our name of a stored tensor, in the original repository's layout or in that of a converted directory."""

EXTRA_DEFAULTS: dict[str, object] = {
    "dmd_denoising_steps": (1000, 666, 333),
    "warp_denoising_step": True,
    "context_noise": 0,
}
"""Published fields of the inference configurations; a step t stands for the shifted time at index 1000 - t."""

_GAME = SamplingParams(
    height=352,
    width=640,
    num_frames=57,
    fps=25.0,
    num_inference_steps=3,
    guidance_scale=1.0,
    flow_shift=5.0,
    extra=EXTRA_DEFAULTS,
)
_RUNNER = SamplingParams(
    num_inference_steps=4, extra={**EXTRA_DEFAULTS, "dmd_denoising_steps": (1000, 750, 500, 250)}
).over(_GAME)

_FOUNDATION = replace(_GAME, num_inference_steps=40, scheduler="unipc", extra=None)

# Steps, shift, size and length (15 latent frames): configs/inference_yaml of github.com/SkyworkAI/Matrix-Game, folder
# Matrix-Game-2. Frame rate, and steps and solver of the foundation models: FastVideo, whose directories these are.
PRESETS: dict[str, SamplingParams] = {
    "FastVideo/Matrix-Game-2.0-Base-Distilled-Diffusers": _GAME,
    "FastVideo/Matrix-Game-2.0-GTA-Distilled-Diffusers": _GAME,
    "FastVideo/Matrix-Game-2.0-TempleRun-Distilled-Diffusers": _RUNNER,
    "FastVideo/Matrix-Game-2.0-Base-Diffusers": _FOUNDATION,
    "FastVideo/Matrix-Game-2.0-GTA-Diffusers": _FOUNDATION,
    "FastVideo/Matrix-Game-2.0-TempleRun-Diffusers": _FOUNDATION,
}
LAYOUTS: dict[int, str] = {4: "universal", 2: "gta_drive", 7: "templerun"}
"""Keyboard width of a model -> its action layout (`media.actions.LAYOUTS`)."""


def preset_for(config: MatrixGameConfig, *, distilled: bool = True) -> SamplingParams:
    """The settings of the published model of this kind with this keyboard."""
    if not distilled:
        return _FOUNDATION
    return _RUNNER if config.action.keyboard_dim_in == 7 else _GAME


def forward_flops(config: MatrixGameConfig, tokens: int) -> float:
    """Floating-point operations of one row of a forward without memory, a multiply-add counted as two.

    As in Wan, with the image's keys and values in place of the text's, and the linear layers of the action modules
    (their attention is over time alone and does not count).
    """
    d, patch, action = config.dim, math.prod(config.patch_size), config.action
    linear = tokens * (6 * d * d + 2 * d * config.ffn_dim) + IMAGE_TOKENS * 2 * d * d
    attention = 2 * tokens * d * (tokens + IMAGE_TOKENS)
    steer = 2 * d * action.keyboard_hidden_dim
    if action.enable_mouse:
        c = action.mouse_hidden_dim
        steer += (d + action.mouse_dim_in * action.window) * c + 4 * c * c + c * d
    ends = tokens * d * patch * (config.in_channels + config.out_channels)
    return 2.0 * (config.num_layers * (linear + attention) + len(action.blocks) * tokens * steer + ends)


SHARDING = ShardPlan(
    {
        "blocks.*.to_q": "colwise",
        "blocks.*.to_k": "colwise",
        "blocks.*.to_v": "colwise",
        "blocks.*.to_out.0": "rowwise",
        "blocks.*.norm_q": "head_norm",
        "blocks.*.norm_k": "head_norm",
        "blocks.*.norm2": "whole",
        "blocks.*.scale_shift_table": "whole",
        "blocks.*.ffn.net.0.proj": "colwise",
        "blocks.*.ffn.net.2": "rowwise",
        "blocks.*.action_model.mouse_mlp.0?": "colwise",
        "blocks.*.action_model.mouse_mlp.2?": "rowwise",
        "blocks.*.action_model.mouse_mlp.3?": "whole",
        "blocks.*.action_model.t_qkv?": "colwise:3",
        "blocks.*.action_model.proj_mouse?": "rowwise",
        "blocks.*.action_model.*_attn_*_norm?": "whole",
        "blocks.*.action_model.keyboard_embed.*?": "whole",
        "blocks.*.action_model.mouse_attn_q?": "colwise",
        "blocks.*.action_model.keyboard_attn_kv?": "colwise:2",
        "blocks.*.action_model.proj_keyboard?": "rowwise",
        "condition_embedder.time_embedder.*": "whole",
        "condition_embedder.time_proj": "gathered",
        "condition_embedder.image_embedder.*": "whole",
        "patch_embedding": "whole",
        "proj_out": "whole",
        "scale_shift_table": "whole",
    },
    outside=("attn2.keys_values",),
)
"""How devices share the weights: heads and hidden units of the blocks, and the projections that make modulation."""
