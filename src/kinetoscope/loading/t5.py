"""The T5 encoder of transformers, used as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kinetoscope.loading.components import register_component
from kinetoscope.loading.directory import ModelDir
from kinetoscope.loading.weights import load_weights


def _load_t5(model: ModelDir, name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(**{k: v for k, v in model.config(name).items() if k not in ("dtype", "torch_dtype")})
    with torch.device("meta"):
        encoder: Any = T5EncoderModel(config)
    encoder.tie_weights()
    # transformers keeps `wo` of T5 in float32 in half precision, where it would overflow
    policy = lambda key: torch.float32 if dtype == torch.float16 and "wo" in key.split(".") else dtype  # noqa: E731
    return load_weights(encoder, model.folder(name), dtype=policy, device=device)


register_component("T5EncoderModel", _load_t5)
