"""CLIP's processor, of which video models use the image half."""

from __future__ import annotations

from typing import Any

import torch

from kinetoscope.loading.components import register_component
from kinetoscope.loading.directory import ModelDir


def _load(model: ModelDir, name: str, dtype: torch.dtype, device: torch.device) -> Any:
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil.from_pretrained(model.folder(name), local_files_only=True)


register_component("CLIPProcessor", _load, weights=False)
