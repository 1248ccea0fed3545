"""Tiny random Cosmos pipelines in diffusers layout, made by diffusers itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

TINY: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 2,
    "attention_head_dim": 20,
    "num_layers": 2,
    "mlp_ratio": 2,
    "text_embed_dim": 32,
    "adaln_lora_dim": 8,
    "max_size": (12, 32, 32),
    "patch_size": (1, 2, 2),
    "rope_scale": (2.0, 1.0, 1.5),
    "concat_padding_mask": True,
    "extra_pos_embed_type": "learnable",
}


@contextmanager
def without_torchvision() -> Iterator[None]:
    """Give diffusers' Cosmos transformer the one function of torchvision it calls: a nearest-neighbour resize."""
    from diffusers.models.transformers import transformer_cosmos as module

    def resize(image: torch.Tensor, size: list[int], interpolation: object = None) -> torch.Tensor:
        return torch.nn.functional.interpolate(image, size=size, mode="nearest")

    stand_in = SimpleNamespace(
        functional=SimpleNamespace(resize=resize), InterpolationMode=SimpleNamespace(NEAREST="nearest")
    )
    before = getattr(module, "transforms", None)
    module.transforms = stand_in
    try:
        yield
    finally:
        module.transforms = before
