"""Video autoencoders of diffusers, used as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kinetoscope.core.onednn import speed_up_convolutions
from kinetoscope.loading.components import register_component
from kinetoscope.loading.directory import ModelDir
from kinetoscope.loading.weights import load_weights


def register_autoencoder(class_name: str) -> None:
    """Say that components of `class_name` are diffusers' class of that name, loaded in float32."""

    def load(model: ModelDir, name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
        import diffusers

        config = {k: v for k, v in model.config(name).items() if not k.startswith("_")}
        with torch.device("meta"):
            vae: Any = getattr(diffusers, class_name)(**config)
        return speed_up_convolutions(
            load_weights(vae, model.folder(name), dtype=lambda _: torch.float32, device=device)
        )

    register_component(class_name, load)
