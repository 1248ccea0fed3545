"""Tiny random HunyuanVideo 1.5 directories in diffusers layout, made by diffusers itself.

The transformer has 4 million parameters: the hidden width of its glyph projection is fixed at 2048.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch

from tiny import perturb

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_qwen_tokenizer() -> Any:
    """One token a character, and a chat template."""
    from transformers import Qwen2Tokenizer

    pieces = [*string.printable.strip(), "Ġ", "Ċ", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made = Qwen2Tokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=[],
        padding_side="right",
        extra_special_tokens=pieces[-2:],
    )
    made.chat_template = CHAT
    return made


def make_tiny_hunyuan15(path: Path, *, image: bool = False, meanflow: bool = False, seed: int = 0) -> Path:
    """A random HunyuanVideo 1.5 pipeline saved at `path`; every parameter perturbed."""
    import diffusers
    import transformers

    torch.manual_seed(seed)  # noqa: TID251 - diffusers initialises from the global generator
    tokenizer, tokenizer_2 = tiny_qwen_tokenizer(), transformers.ByT5Tokenizer()
    text_encoder = transformers.Qwen2_5_VLTextModel(
        transformers.Qwen2_5_VLTextModel.config_class(
            vocab_size=len(tokenizer),
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 2, 2]},
        )
    )
    text_encoder_2 = transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=len(tokenizer_2), d_model=20, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    )
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=24,
        text_embed_2_dim=20,
        image_embed_dim=12,
        rope_axes_dim=(4, 6, 6),
        target_size=64,
        task_type="i2v" if image else "t2v",
        use_meanflow=meanflow,
    )
    for index, module in enumerate((transformer, text_encoder, text_encoder_2)):
        perturb(module, seed + index)
    parts: dict[str, Any] = {
        "text_encoder": text_encoder.eval(),
        "tokenizer": tokenizer,
        "transformer": transformer.eval(),
        "vae": diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1
        ).eval(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        "text_encoder_2": text_encoder_2.eval(),
        "tokenizer_2": tokenizer_2,
        "guider": diffusers.ClassifierFreeGuidance(guidance_scale=6.0),
    }
    if not image:
        diffusers.HunyuanVideo15Pipeline(**parts).save_pretrained(path)
        return path
    parts["image_encoder"] = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            hidden_size=12,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        )
    ).eval()
    perturb(parts["image_encoder"], seed + 4)
    parts["feature_extractor"] = transformers.SiglipImageProcessor(size={"height": 16, "width": 16})
    diffusers.HunyuanVideo15ImageToVideoPipeline(**parts).save_pretrained(path)
    return path
