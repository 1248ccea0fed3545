"""Tiny random SkyReels-V2 directories in diffusers layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tiny import perturb, tiny_tokenizer


def make_tiny_skyreels(path: Path, pipeline: str, seed: int = 0, *, shift: float = 3.0, last: bool = False) -> Path:
    """A random directory of the diffusers pipeline class `pipeline`, saved at `path` (under 1 MB).

    `last` gives an image-to-video transformer positions for the features of two images.
    """
    import diffusers
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
        UMT5Config,
        UMT5EncoderModel,
    )

    reads_image = pipeline == "SkyReelsV2ImageToVideoPipeline"
    torch.manual_seed(seed)  # noqa: TID251 - diffusers initialises from the global generator
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    tokenizer = tiny_tokenizer()
    text_encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    )
    features = {"image_dim": 12, "added_kv_proj_dim": 24, "pos_embed_seq_len": 2 * 5 if last else None}
    transformer = diffusers.SkyReelsV2Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=36 if reads_image else 16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        rope_max_seq_len=64,
        inject_sample_info="Forcing" in pipeline,
        **(features if reads_image else {}),
    )
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    modules: dict[str, Any] = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}
    if reads_image:
        vision = CLIPVisionConfig(
            hidden_size=12, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=8, patch_size=4
        )
        modules["image_encoder"] = CLIPVisionModelWithProjection(vision)
    for index, module in enumerate(modules.values()):
        perturb(module, seed + 1 + index)
        module.eval()
    if reads_image:
        size = {"height": 8, "width": 8}
        modules["image_processor"] = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=size)
    made = getattr(diffusers, pipeline)(tokenizer=tokenizer, scheduler=scheduler, **modules)
    made.save_pretrained(path)
    return path
