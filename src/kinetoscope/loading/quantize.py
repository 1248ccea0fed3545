"""Weights of a transformer's blocks in 8 bits, by torchao.

Only the linear layers inside the blocks are quantized: they are nearly all of the weights. Embeddings, modulation,
norms, the output projection and whatever the family keeps in float32 stay as they are, since they are small and errors
in them reach every token.

Every kind is lossy; `docs/memory-and-speed.md` says by how much.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kinetoscope.core.config import onednn_limit_setting
from kinetoscope.core.cpu import has_exact_int8_products
from kinetoscope.core.errors import CompositionError, ConfigError
from kinetoscope.core.spec import unknown


@dataclass(frozen=True, slots=True)
class QuantizationKind:
    """How weights, and with "dynamic" the inputs of each layer, are stored in 8 bits.

    Attributes:
        weight_bits: of a stored weight.
        dynamic: inputs are quantized too, one scale a token, and multiplied in 8 bits.
        says: for help and documents.
    """

    weight_bits: int
    dynamic: bool
    says: str


QUANTIZATIONS: dict[str, QuantizationKind] = {
    "int8": QuantizationKind(8, False, "weights in int8, one scale an output channel; computed in the model's dtype"),
    "int8-dynamic": QuantizationKind(8, True, "weights and inputs in int8, one scale a channel and a token"),
    "fp8": QuantizationKind(8, False, "weights in float8 (e4m3), one scale an output channel"),
    "fp8-dynamic": QuantizationKind(8, True, "weights and inputs in float8; CUDA with bfloat16"),
}
SMALLEST = 16
"""Layers narrower than this stay as they are; on CUDA, where inputs are quantized too, so do those that are no multiple
of it, which 8-bit products there want."""
FP8_CAPABILITY = (8, 9)


def check_quantization(kind: str, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse what cannot work here, before anything is loaded.

    Raises:
        ConfigError: an unknown kind, or torchao is not installed.
        CompositionError: the kind does not work on the device or in the dtype, or gives wrong sums on this CPU.
    """
    if kind not in QUANTIZATIONS:
        raise ConfigError(unknown("quantization", kind, QUANTIZATIONS))
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(f"quantize={kind!r} needs torchao; install it with: pip install 'kinetoscope[quant]'")
    if kind == "int8-dynamic" and device.type == "cpu" and not has_exact_int8_products():
        why, action = "", "use int8"
        if setting := onednn_limit_setting():
            why = f", since {setting} holds oneDNN below the 8-bit instructions (VNNI) of this processor"
            action = f"unset {setting.partition('=')[0]}, set it to AVX512_CORE_VNNI or higher, or use int8"
        raise CompositionError(f"quantize='int8-dynamic': torch adds 8-bit products wrongly here{why}; {action}")
    if kind == "fp8-dynamic":
        if device.type != "cuda":
            raise CompositionError(
                f"quantize='fp8-dynamic' does not work on device {device.type!r}: torch multiplies float8 on CUDA "
                "only; use fp8 or int8-dynamic"
            )
        if torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
            raise CompositionError(
                "quantize='fp8-dynamic' needs a GPU of compute capability 8.9 or more (Ada, Hopper); "
                f"{torch.cuda.get_device_name(device)} has less; use fp8 or int8-dynamic"
            )
        if dtype != torch.bfloat16:
            raise CompositionError(f"quantize='fp8-dynamic' computes in bfloat16, not in dtype {dtype}; use fp8")


def quantized_layers(transformer: nn.Module, multiple: int = 1) -> Iterator[tuple[str, nn.Linear]]:
    """(name, layer) of the linear layers that quantization stores in 8 bits: those whose sizes are multiples."""
    kept: set[str] = set(getattr(transformer, "keep_in_float32", ()))
    inside = {id(m) for block in _blocks(transformer) for m in block.modules()}
    for name, layer in transformer.named_modules():
        if not isinstance(layer, nn.Linear) or id(layer) not in inside or not _may_be_coarse(name, layer, kept):
            continue
        if layer.in_features % multiple == 0 and layer.out_features % multiple == 0:
            yield name, layer


def quantize_blocks(transformer: nn.Module, kind: str, device: torch.device | None = None) -> int:
    """Quantize the linear layers of the blocks where they stand; returns how many there were.

    Args:
        transformer: loaded, in inference.
        kind: of `QUANTIZATIONS`, checked.
        device: where to do the arithmetic, layer by layer; each layer goes back to where it was. None: where it is.
    """
    quantize_, config = _torchao(kind)
    count = 0
    strict = QUANTIZATIONS[kind].dynamic and device is not None and device.type == "cuda"
    for _, layer in list(quantized_layers(transformer, SMALLEST if strict else 1)):
        home = layer.weight.device
        quantize_(layer, config, device=device)
        layer.to(home)
        layer.requires_grad_(False)
        count += 1
    return count


def _torchao(kind: str) -> tuple[Callable[..., Any], Any]:
    """torchao's function, and its configuration for a kind."""
    logger = logging.getLogger("torchao")
    level, _ = logger.level, logger.setLevel(logging.CRITICAL)  # it tells of kernels that were not built for here
    try:
        from torchao import quantization as ao
    finally:
        logger.setLevel(level)
    configs: dict[str, Callable[[], Any]] = {
        "int8": ao.Int8WeightOnlyConfig,
        "int8-dynamic": ao.Int8DynamicActivationInt8WeightConfig,
        "fp8": lambda: ao.Float8WeightOnlyConfig(),
        "fp8-dynamic": lambda: ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow()),
    }
    return ao.quantize_, configs[kind]()


def _blocks(transformer: nn.Module) -> Sequence[nn.Module]:
    return getattr(transformer, "blocks", ())


def _may_be_coarse(name: str, layer: nn.Linear, kept: set[str]) -> bool:
    """Whether a layer of a block is one of the large products over all tokens: no modulation, nothing kept exact."""
    parts = name.split(".")
    modulation = any(p.startswith("norm") or "modulation" in p.lower() for p in parts)
    return not modulation and not kept & set(parts) and min(layer.in_features, layer.out_features) >= SMALLEST
