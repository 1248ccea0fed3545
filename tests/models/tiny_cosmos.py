"""Tiny random Cosmos pipelines in diffusers layout, made by diffusers itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tiny import LETTERS, perturb, tiny_tokenizer

TINY: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 2,
    "attention_head_dim": 20,
    "num_layers": 2,
    "mlp_ratio": 2,
    "text_embed_dim": 32,
    "adaln_lora_dim": 8,
    "max_size": (128, 240, 240),
    "patch_size": (1, 2, 2),
    "rope_scale": (2.0, 1.0, 1.5),
    "concat_padding_mask": True,
    "extra_pos_embed_type": "learnable",
}


@contextmanager
def without_torchvision() -> Iterator[None]:
    """Give diffusers' Cosmos modules the functions of torchvision they call: a nearest-neighbour resize, to_tensor."""
    from diffusers.models.transformers import transformer_cosmos
    from diffusers.pipelines.cosmos import pipeline_cosmos2_5_predict

    def resize(image: torch.Tensor, size: list[int], interpolation: object = None) -> torch.Tensor:
        return torch.nn.functional.interpolate(image, size=size, mode="nearest")

    functional = SimpleNamespace(resize=resize, to_tensor=lambda image: image)  # tests give tensors
    stand_in = SimpleNamespace(functional=functional, InterpolationMode=SimpleNamespace(NEAREST="nearest"))
    places: list[tuple[Any, str, Any]] = [
        (transformer_cosmos, "transforms", stand_in),
        (pipeline_cosmos2_5_predict, "torchvision", SimpleNamespace(transforms=stand_in)),
    ]
    before = [getattr(module, name, None) for module, name, _ in places]
    for module, name, value in places:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(places, before, strict=True):
            setattr(module, name, value)


class NoGuardrail:
    """Stands where diffusers' Cosmos pipelines want a safety checker."""

    def to(self, device: object) -> NoGuardrail:
        return self

    def check_text_safety(self, text: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


def make_tiny_cosmos(path: Path, kind: str, seed: int = 0, *, statistics: bool = True) -> Path:
    """A random Cosmos pipeline of diffusers' class `kind` saved at `path` (below 1 MB); every parameter perturbed.

    Args:
        statistics: whether the VAE of Predict 1 has latent means and deviations, one a channel and frame.
    """
    import diffusers

    torch.manual_seed(seed)  # noqa: TID251 - diffusers initialises from the global generator
    first, image, newest = kind.startswith(("CosmosT", "CosmosV")), "Image" in kind, "2_5" in kind
    changes: dict[str, Any] = {"in_channels": 16 if image or "TextToWorld" in kind else 17}
    if not first:
        changes |= {"extra_pos_embed_type": None, "rope_scale": (1.0, 3.0, 3.0)}
    if newest:
        changes |= {
            "use_crossattn_projection": True,
            "crossattn_proj_in_channels": 2 * 16,
            "encoder_hidden_states_channels": 32,
        }
    transformer = diffusers.CosmosTransformer3DModel(**TINY | changes)
    vae = _vae_1(statistics) if first else _vae_2()
    tokenizer, text_encoder = _qwen() if newest else _t5()
    schedulers = {  # the published configurations
        "1": lambda: diffusers.EDMEulerScheduler(
            sigma_min=0.002, sigma_max=80, sigma_data=0.5, sigma_schedule="karras", final_sigmas_type="sigma_min"
        ),
        "2": lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        "2.5": lambda: diffusers.UniPCMultistepScheduler(
            use_karras_sigmas=True,
            use_flow_sigmas=True,
            prediction_type="flow_prediction",
            sigma_max=200.0,
            sigma_min=0.01,
        ),
    }
    for index, module in enumerate((transformer, text_encoder, vae)):
        perturb(module, seed + 1 + index)
    pipeline = getattr(diffusers, kind)(
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
        vae=vae.eval(),
        scheduler=schedulers["1" if first else "2.5" if newest else "2"](),
        safety_checker=NoGuardrail(),
    )
    pipeline.save_pretrained(path)
    index_file = path / "model_index.json"
    index_file.write_text(json.dumps(json.loads(index_file.read_text()) | {"safety_checker": [None, None]}))
    return path


def _vae_1(statistics: bool) -> torch.nn.Module:
    from diffusers import AutoencoderKLCosmos

    generator = torch.Generator().manual_seed(11)
    numbers = {
        "latents_mean": torch.randn(16 * 3, generator=generator).tolist(),
        "latents_std": (0.5 + torch.rand(16 * 3, generator=generator)).tolist(),
    }
    return AutoencoderKLCosmos(
        latent_channels=16,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(),
        resolution=64,
        num_layers=1,
        patch_size=4,
        spatial_compression_ratio=8,
        temporal_compression_ratio=8,
        **(numbers if statistics else {"latents_mean": None, "latents_std": None}),
    )


def _vae_2() -> torch.nn.Module:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def _t5() -> tuple[Any, torch.nn.Module]:
    from transformers import T5Config, T5EncoderModel

    tokenizer = tiny_tokenizer()
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return tokenizer, T5EncoderModel(config)


def _qwen() -> tuple[Any, torch.nn.Module]:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    letters = [*LETTERS, "Ġ", "Ċ", ",", ".", "_", *LETTERS.upper()]  # byte-level: Ġ is a space, Ċ a line end
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(special + letters)}, merges=[], unk_token="<|endoftext|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% for part in message.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
    )
    text = {
        "vocab_size": len(tokenizer) + 8,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
        "fullatt_block_indexes": [0],
    }
    return tokenizer, Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
