"""Tiny random model directories in diffusers layout, made by diffusers itself: the oracle's own files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def tiny_tokenizer():
    """A T5 tokenizer over words of the tests and single letters, built as data (training one is not deterministic)."""
    from transformers import T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", "▁"]
    words = ["a", "red", "blue", "circle", "square", "moving", "left", "right", "on", "black", "white", "small", "cat"]
    pieces += ["▁" + w for w in words] + list(LETTERS) + ["▁" + c for c in LETTERS if "▁" + c not in ("▁a",)]
    return T5Tokenizer(vocab=[(p, -float(i)) for i, p in enumerate(pieces)], extra_ids=0)


def perturb(module: torch.nn.Module, seed: int, scale: float = 0.05) -> None:
    """Move every parameter, so that no gate, norm or bias is tested at zero or one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)


def make_tiny_wan(
    path: Path,
    seed: int = 0,
    *,
    scheduler: str = "unipc",
    shift: float = 3.0,
    layers: int = 2,
    shard_size: str | None = None,
    kind: str = "t2v",
) -> Path:
    """A random Wan pipeline saved at `path` (about 1 MB); every parameter perturbed.

    Args:
        kind: "t2v"; of Wan 2.1 "i2v" and "flf2v" (image features); of Wan 2.2 "a14b", "i2v-a14b" (two experts),
            "ti2v" (time frame by frame) and "ti2v-i2v" (the same as diffusers' image pipeline).
    """
    from diffusers import (
        AutoencoderKLWan,
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
        FlowMatchHeunDiscreteScheduler,
        UniPCMultistepScheduler,
        WanImageToVideoPipeline,
        WanPipeline,
        WanTransformer3DModel,
    )
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)  # noqa: TID251 - diffusers initialises from the global generator
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    tokenizer = tiny_tokenizer()
    text_encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    )
    image = kind in ("i2v", "flf2v", "i2v-a14b")
    features = {"image_dim": 24, "added_kv_proj_dim": 24} if kind in ("i2v", "flf2v") else {}

    def make_transformer(seed: int) -> WanTransformer3DModel:
        made = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=36 if image else 16,
            out_channels=16,
            text_dim=32,
            freq_dim=256,
            ffn_dim=48,
            num_layers=layers,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=64 if kind == "t2v" else 128,
            pos_embed_seq_len=34 if kind == "flf2v" else None,
            **features,
        )
        perturb(made, seed)
        return made.eval()

    transformer = make_transformer(seed + 1)
    perturb(text_encoder, seed + 2)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    schedulers = {
        "unipc": lambda: UniPCMultistepScheduler(**flow),
        "dpm++": lambda: DPMSolverMultistepScheduler(**flow),
        "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=shift),
        "heun": lambda: FlowMatchHeunDiscreteScheduler(shift=shift),
    }
    parts: dict[str, Any] = {
        "tokenizer": tokenizer, "text_encoder": text_encoder.eval(), "vae": vae.eval(),
        "scheduler": schedulers[scheduler](), "transformer": transformer,
    }  # fmt: skip
    if kind.endswith("a14b"):
        parts |= {"transformer_2": make_transformer(seed + 3), "boundary_ratio": 0.875}
    if kind.startswith("ti2v"):
        parts |= {"expand_timesteps": True}
    if features:
        vision = CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        )
        encoder = CLIPVisionModel(vision)
        perturb(encoder, seed + 4)
        size = {"shortest_edge": 32}
        processor = CLIPImageProcessorPil(size=size, crop_size={"height": 32, "width": 32})
        parts |= {"image_encoder": encoder.eval(), "image_processor": processor}
    elif image or kind == "ti2v-i2v":
        parts |= {"image_encoder": None, "image_processor": None}
    pipeline = (WanImageToVideoPipeline if image or kind == "ti2v-i2v" else WanPipeline)(**parts)
    pipeline.save_pretrained(path, **({"max_shard_size": shard_size} if shard_size else {}))
    return path
