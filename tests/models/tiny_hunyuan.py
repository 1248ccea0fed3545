"""Tiny random HunyuanVideo directories in diffusers layout, made by diffusers itself."""

from __future__ import annotations

import re
import string
from pathlib import Path
from typing import Any

import torch

from kinetoscope.models.hunyuan import spec
from tiny import perturb

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>"]
TRANSFORMER: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": 24,
    "pooled_projection_dim": 20,
    "rope_axes_dim": (4, 6, 6),
}


def tiny_llama_tokenizer() -> Any:
    """One token a character, but for the special tokens and the longer words of the templates."""
    from transformers import LlamaTokenizer

    letters = [*string.printable.strip(), "▁", "\n"]
    vocab = {token: index for index, token in enumerate([*SPECIAL, *letters])}
    made = LlamaTokenizer(
        vocab=vocab, merges=[], pad_token="<pad>", padding_side="right", extra_special_tokens=SPECIAL[4:]
    )
    made.add_tokens(sorted(set(re.findall(r"[A-Za-z]{3,}", spec.IMAGE_TEMPLATE))))
    return made


def tiny_clip_tokenizer() -> Any:
    """One token a character."""
    from transformers import CLIPTokenizer

    letters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], model_max_length=77)


def llama_config(tokenizer: Any) -> Any:
    """Four layers, so that the third hidden state from the end is neither the first nor the last."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=tokenizer.pad_token_id,
    )


def tiny_clip_text(tokenizer: Any) -> Any:
    """A CLIP text encoder of width 20."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=20,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=20,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tiny_vae() -> Any:
    """A HunyuanVideo VAE with four latent channels."""
    from diffusers import AutoencoderKLHunyuanVideo

    return AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )


def make_tiny_hunyuan(path: Path, seed: int = 0) -> Path:
    """A random HunyuanVideo text-to-video pipeline saved at `path`; every parameter perturbed."""
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
    from transformers import LlamaModel

    torch.manual_seed(seed)  # noqa: TID251 - diffusers initialises from the global generator
    tokenizer, tokenizer_2 = tiny_llama_tokenizer(), tiny_clip_tokenizer()
    text_encoder, text_encoder_2 = LlamaModel(llama_config(tokenizer)), tiny_clip_text(tokenizer_2)
    transformer = HunyuanVideoTransformer3DModel(**TRANSFORMER)
    for index, module in enumerate((transformer, text_encoder, text_encoder_2)):
        perturb(module, seed + index)
    pipeline = HunyuanVideoPipeline(
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
        vae=tiny_vae().eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=text_encoder_2.eval(),
        tokenizer_2=tokenizer_2,
    )
    pipeline.save_pretrained(path)
    return path


def make_tiny_hunyuan_i2v(path: Path, kind: str, seed: int = 0) -> Path:
    """A random HunyuanVideo image-to-video pipeline of an `image_condition_type`; every parameter perturbed."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoImageToVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)  # noqa: TID251 - diffusers initialises from the global generator
    tokenizer, tokenizer_2 = tiny_llama_tokenizer(), tiny_clip_tokenizer()
    vision = CLIPVisionConfig(  # 24 x 24 patches, as the published tower
        hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=48, patch_size=2
    )
    text_encoder = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=llama_config(tokenizer),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            pad_token_id=tokenizer.pad_token_id,
            image_seq_length=576,
        )
    )
    text_encoder_2 = tiny_clip_text(tokenizer_2)
    concat = {"in_channels": 9, "guidance_embeds": False} if kind == "latent_concat" else {}
    transformer = HunyuanVideoTransformer3DModel(**TRANSFORMER | concat, image_condition_type=kind)
    for index, module in enumerate((transformer, text_encoder, text_encoder_2)):
        perturb(module, seed + index)
    pipeline = HunyuanVideoImageToVideoPipeline(
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
        vae=tiny_vae().eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=text_encoder_2.eval(),
        tokenizer_2=tokenizer_2,
        image_processor=CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}),
    )
    pipeline.save_pretrained(path)
    return path
