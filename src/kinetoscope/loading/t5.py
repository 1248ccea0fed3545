"""The T5 and UMT5 encoders of transformers, used as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kinetoscope.core.sharding import ShardPlan
from kinetoscope.loading.components import Place, register_component
from kinetoscope.loading.directory import ModelDir
from kinetoscope.loading.weights import load_weights

T5_SHARDING = ShardPlan(
    {
        "shared": "vocabulary",
        "encoder.embed_tokens": "vocabulary",
        "encoder.block.*.SelfAttention": "heads",
        "encoder.block.*.SelfAttention.q": "colwise",
        "encoder.block.*.SelfAttention.k": "colwise",
        "encoder.block.*.SelfAttention.v": "colwise",
        "encoder.block.*.SelfAttention.o": "rowwise",
        "encoder.block.*.SelfAttention.relative_attention_bias": "columns",
        "encoder.block.*.DenseReluDense.wi*": "colwise",
        "encoder.block.*.DenseReluDense.wo": "rowwise",
        "encoder.block.*.layer_norm": "whole",
        "encoder.final_layer_norm": "whole",
    },
    roots=(),
    may_be_whole=True,
)
"""How devices share the weights of T5 and UMT5: words, heads with their biases of positions, hidden units."""


def _loader(family: str) -> Callable[..., nn.Module]:
    """Of "T5" or "UMT5"."""

    def load(
        model: ModelDir, name: str, dtype: torch.dtype, device: torch.device, place: Place | None = None
    ) -> nn.Module:
        import transformers

        config = {k: v for k, v in model.config(name).items() if k not in ("dtype", "torch_dtype")}
        with torch.device("meta"):
            encoder: Any = getattr(transformers, f"{family}EncoderModel")(
                getattr(transformers, f"{family}Config")(**config)
            )
        encoder.tie_weights()
        share = place(encoder, T5_SHARDING) if place else None
        # transformers keeps `wo` of T5 in float32 in half precision, where it would overflow
        policy = lambda key: torch.float32 if dtype == torch.float16 and "wo" in key.split(".") else dtype  # noqa: E731
        return load_weights(encoder, model.folder(name), dtype=policy, device=device, share=share)

    return load


for _family in ("T5", "UMT5"):
    register_component(f"{_family}EncoderModel", _loader(_family), T5_SHARDING)
