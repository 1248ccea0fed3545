"""Tiny random model directories in diffusers layout, made by diffusers itself: the oracle's own files."""

from __future__ import annotations

from pathlib import Path

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
) -> Path:
    """A random Wan 2.1 T2V pipeline saved at `path` (about 1 MB); every parameter perturbed."""
    from diffusers import (
        AutoencoderKLWan,
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
        UniPCMultistepScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)  # noqa: TID251 - diffusers initialises from the global generator
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    tokenizer = tiny_tokenizer()
    text_encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=256,
        ffn_dim=48,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )
    perturb(transformer, seed + 1)
    perturb(text_encoder, seed + 2)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    schedulers = {
        "unipc": lambda: UniPCMultistepScheduler(**flow),
        "dpm++": lambda: DPMSolverMultistepScheduler(**flow),
        "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=shift),
    }
    pipeline = WanPipeline(tokenizer, text_encoder.eval(), vae.eval(), schedulers[scheduler](), transformer.eval())
    pipeline.save_pretrained(path, **({"max_shard_size": shard_size} if shard_size else {}))
    return path
