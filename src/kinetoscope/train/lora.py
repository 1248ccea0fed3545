"""Low-rank changes in training (arXiv 2106.09685), and the files in which they are given to other programs.

Any method trains them: a role's frozen transformer carries the layers, and its optimizer has nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kinetoscope.core.errors import ConfigError
from kinetoscope.core.files import replacing
from kinetoscope.loading.lora_sampling import LoraSampling
from kinetoscope.nn.original_names import VIDEO_TRANSFORMER, renamer
from kinetoscope.train.post import LoraSection

DIFFUSERS_FILE, COMFYUI_FILE = "pytorch_lora_weights.safetensors", "comfyui.safetensors"
_AUTHORS = (  # ours (and diffusers') -> the names of the model's authors, which ComfyUI knows
    (".attn1.", ".self_attn."), (".attn2.", ".cross_attn."), (".to_q", ".q"), (".to_k", ".k"), (".to_v", ".v"),
    (".to_out.0", ".o"), (".ffn.net.0.proj", ".ffn.0"), (".ffn.net.2", ".ffn.2"),
)  # fmt: skip


class LoraLayer(nn.Module):
    """x -> scale x down^T up^T, zero at first."""

    def __init__(self, layer: nn.Linear, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        bound = layer.in_features**-0.5  # as PEFT draws it: Kaiming with a = sqrt(5)
        start = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=generator)
        self.down = nn.Parameter(start.to(layer.weight.device))  # [r, in]
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank, device=layer.weight.device))  # [out, r]
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        return nn.functional.linear(nn.functional.linear(x, self.down), self.up) * self.scale


class LoraLayers(nn.Module):
    """The layers of a transformer, attached to it: its forward adds them, its own parameters are frozen.

    Args:
        transformer: what carries them.
        section: which layers, and how.
        generator: of the first weights.

    Raises:
        ConfigError: no linear layer is named so.
    """

    def __init__(self, transformer: nn.Module, section: LoraSection, generator: torch.Generator) -> None:
        super().__init__()
        transformer.requires_grad_(False)
        self.section = section
        scale = (section.rank if section.alpha is None else section.alpha) / section.rank
        self.layers = nn.ModuleDict()
        self._named: dict[str, LoraLayer] = {}
        linear = {n: m for n, m in transformer.named_modules() if isinstance(m, nn.Linear)}
        for name, layer in linear.items():
            if any(target in name for target in section.targets):
                made = LoraLayer(layer, section.rank, scale, generator)
                self._named[name] = self.layers[name.replace(".", "/")] = made
                layer.register_forward_hook(lambda _, args, output, made=made: output + made(args[0]))
        if not self._named:
            raise ConfigError(
                f"lora.targets {', '.join(section.targets)} are in the name of no linear layer; some that there are: "
                f"{', '.join(list(linear)[:8])}"
            )

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer -> its matrices: down [r, in], up [out, r]."""
        return {name: (layer.down.detach(), layer.up.detach()) for name, layer in self._named.items()}

    def changes(self) -> dict[str, Tensor]:
        """Parameter -> what is added to it."""
        return {f"{name}.weight": m.scale * m.up.detach() @ m.down.detach() for name, m in self._named.items()}


def save_lora(layers: LoraLayers, folder: Path, sampling: LoraSampling | None = None) -> list[Path]:
    """Write the layers as PEFT names them: for diffusers (which PEFT reads too), and for ComfyUI if the model's
    authors named its layers otherwise.

    Args:
        sampling: how the model is sampled with them, for the headers; None: as without them.

    Returns:
        the files.

    Raises:
        OutputError: a file cannot be written.
    """
    section = layers.section
    alpha = float(section.rank if section.alpha is None else section.alpha)
    pairs = {n: (down.cpu().contiguous(), up.cpu().contiguous()) for n, (down, up) in layers.pairs().items()}
    config = {"transformer.r": section.rank, "transformer.lora_alpha": alpha, "transformer.target_modules": list(pairs)}
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in pairs.items():
        tensors |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    header = {"format": "pt", **(sampling.header() if sampling else {})}
    adapter = {"lora_adapter_metadata": json.dumps(config, indent=2, sort_keys=True)}
    files = [_save(tensors, folder / DIFFUSERS_FILE, header | adapter)]
    names = {name: authors_name(name) for name in pairs}
    if all(names.values()):
        tensors = {}
        for name, (down, up) in pairs.items():
            stem = f"diffusion_model.{names[name]}"
            tensors |= {
                f"{stem}.lora_A.weight": down,
                f"{stem}.lora_B.weight": up,
                f"{stem}.alpha": torch.tensor(alpha),
            }
        files.append(_save(tensors, folder / COMFYUI_FILE, header))
    return files


def authors_name(name: str) -> str | None:
    """The name that a layer has in its authors' code (Wan and what was built on it); None: it is not known."""
    found = name
    for ours, theirs in _AUTHORS:
        found = found.replace(ours, theirs)
    return found if found != name and renamer(VIDEO_TRANSFORMER)(f"{found}.weight") == f"{name}.weight" else None


def _save(tensors: dict[str, Tensor], path: Path, header: dict[str, str]) -> Path:
    with replacing(path) as temporary:
        save_file(tensors, temporary, header)
    return path
