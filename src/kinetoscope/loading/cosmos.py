"""The VAE and scheduler of Cosmos Predict 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kinetoscope.core.onednn import speed_up_convolutions
from kinetoscope.diffusion.edm import EDMAdapter
from kinetoscope.loading.components import register_component
from kinetoscope.loading.directory import ModelDir
from kinetoscope.loading.weights import load_weights


def _load_vae(model: ModelDir, name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    from diffusers import AutoencoderKLCosmos  # pyright: ignore[reportPrivateImportUsage]

    config = {k: v for k, v in model.config(name).items() if not k.startswith("_")}
    vae: Any = AutoencoderKLCosmos(**config)  # not on the meta device: its wavelets are in no file
    load_weights(vae, model.folder(name), dtype=lambda _: torch.float32, device=device)
    return speed_up_convolutions(vae.to(device))


def _load_scheduler(model: ModelDir, name: str, dtype: torch.dtype, device: torch.device) -> EDMAdapter:
    return EDMAdapter({k: v for k, v in model.config(name).items() if not k.startswith("_")})


register_component("AutoencoderKLCosmos", _load_vae)
register_component("EDMEulerScheduler", _load_scheduler, weights=False)
