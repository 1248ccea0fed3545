"""What the LongCat-Video fixtures and their tests share: tiny sizes, the recorded requests, pictures made by rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

FIXTURES = Path(__file__).parents[1] / "fixtures" / "longcat"
MODEL = FIXTURES / "model"
"""A tiny random model in the published layout: `dit/` and no model_index.json."""

DIT: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 2,
    "caption_channels": 32,
    "mlp_ratio": 4,
    "adaln_tembed_dim": 16,
    "frequency_embedding_size": 32,
    "patch_size": [1, 2, 2],
    "text_tokens_zero_pad": True,
}
PROMPT, NEGATIVE = "a red circle moving left on black", "a blue cat"
SIZE = (32, 48)  # height, width of text, image and continuation runs
REFINED = (64, 64)  # of refinement runs
STAGE1 = (5, 24, 40)  # frames, height, width of the video to refine
SEED = 3

# name -> published method, and its arguments. `image`, `video` and `stage1_video` name `moving_picture` sizes.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "t2v": ("t2v", {"guidance_scale": 4.0, "num_frames": 9, "num_inference_steps": 5}),
    "t2v_g1": ("t2v", {"guidance_scale": 1.0, "num_frames": 9, "num_inference_steps": 5}),
    "t2v_distill": ("t2v", {"guidance_scale": 1.0, "num_frames": 5, "num_inference_steps": 4, "use_distill": True}),
    "i2v": ("i2v", {"guidance_scale": 4.0, "num_frames": 9, "num_inference_steps": 5}),
    "i2v_g1": ("i2v", {"guidance_scale": 1.0, "num_frames": 9, "num_inference_steps": 5}),
    **{
        f"vc{'_cache' if cache else ''}_g{guidance}": (
            "vc",
            {
                "guidance_scale": float(guidance),
                "num_frames": 17,
                "num_cond_frames": 5,
                "num_inference_steps": 5,
                "use_kv_cache": cache,
                "enhance_hf": True,
            },
        )
        for cache in (True, False)
        for guidance in (1, 4)
    },
    "vc_distill": (
        "vc",
        {
            "guidance_scale": 1.0,
            "num_frames": 13,
            "num_cond_frames": 5,
            "num_inference_steps": 4,
            "use_kv_cache": True,
            "enhance_hf": False,
            "use_distill": True,
        },
    ),
    "refine": ("refine", {"num_inference_steps": 6}),
    "refine_spatial": ("refine", {"num_inference_steps": 6, "spatial_refine_only": True, "t_thresh": 0.7}),
    "refine_i2v": ("refine", {"num_inference_steps": 6, "num_cond_frames": 1, "condition": "image"}),
    "refine_vc": ("refine", {"num_inference_steps": 6, "num_cond_frames": 5, "condition": "video"}),
}


def moving_picture(frames: int, height: int, width: int) -> np.ndarray:
    """uint8 [T, H, W, 3]: slanted waves that drift, the same on every machine."""
    t, y, x, c = np.ogrid[:frames, :height, :width, :3]
    phase = (5 * x + 3 * y + 17 * t + 60 * c) % 256
    return np.where(phase < 128, 2 * phase, 511 - 2 * phase).astype(np.uint8)
