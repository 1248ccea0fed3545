"""LoRA files for the tiny Wan models of `tiny`, in the key styles of the programs that write them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

DIM, FFN, BLOCKS = 24, 48, 2
ATTENTION = ("q", "k", "v", "o")
OURS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}


def layers(blocks: int = BLOCKS, dim: int = DIM, ffn: int = FFN) -> dict[str, tuple[str, int, int]]:
    """Layer by its authors' name -> diffusers' name, inputs, outputs: what Wan LoRAs are usually trained on."""
    found: dict[str, tuple[str, int, int]] = {}
    for block in range(blocks):
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2")):
            for part in ATTENTION:
                found[f"blocks.{block}.{theirs}.{part}"] = (f"blocks.{block}.{ours}.{OURS[part]}", dim, dim)
        found[f"blocks.{block}.ffn.0"] = (f"blocks.{block}.{OURS['ffn.0']}", dim, ffn)
        found[f"blocks.{block}.ffn.2"] = (f"blocks.{block}.{OURS['ffn.2']}", ffn, dim)
    return found


def factors(seed: int = 0, rank: int = 4, scale: float = 0.3, **sizes: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer by its authors' name -> random down [r, in] and up [out, r]."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(rank, n, generator=draw) * scale, torch.randn(m, rank, generator=draw) * scale)
        for name, (_, n, m) in layers(**sizes).items()
    }


def deltas(pairs: dict[str, tuple[Tensor, Tensor]], scale: float = 1.0) -> dict[str, Tensor]:
    """Parameter in diffusers' names -> scale * up @ down, the oracle of every test."""
    return {
        f"{layers()[n][0]}.weight": scale * (up.double() @ down.double()).float() for n, (down, up) in pairs.items()
    }


def tensors(style: str, pairs: dict[str, tuple[Tensor, Tensor]], alpha: float | None = None) -> dict[str, Tensor]:
    """The tensors of a file: style "diffusers", "diffusers-2" (of the second transformer), "comfyui", "kohya", ..."""
    found: dict[str, Tensor] = {}
    for name, (down, up) in pairs.items():
        published = layers()[name][0]
        stem, a, b = {
            "diffusers": (f"transformer.{published}", "lora_A", "lora_B"),
            "diffusers-2": (f"transformer_2.{published}", "lora_A", "lora_B"),
            "comfyui": (f"diffusion_model.{name}", "lora_A", "lora_B"),
            "comfyui-down": (f"diffusion_model.{name}", "lora_down", "lora_up"),
            "kohya": (f"lora_unet_{name.replace('.', '_')}", "lora_down", "lora_up"),
            "half-kohya": (f"lora_unet_{name.replace('.', '_', 1)}", "lora_down", "lora_up"),
            "bare": (name, "lora_down", "lora_up"),
        }[style]
        found |= {f"{stem}.{a}.weight": down.clone(), f"{stem}.{b}.weight": up.clone()}
        if alpha is not None:
            found[f"{stem}.alpha"] = torch.tensor(alpha)
    return found


def write(path: Path, content: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """A .safetensors file."""
    save_file(content, path, metadata)
    return path
