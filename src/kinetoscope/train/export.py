"""A finished model as a directory that both Kinetoscope and diffusers load."""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import nn

from kinetoscope.core.version import __version__
from kinetoscope.diffusion.scheduler import SCHEDULERS
from kinetoscope.train.recipe import Recipe

INDEX = {
    "_class_name": "WanPipeline",
    "_diffusers_version": diffusers.__version__,
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


def export_model(
    folder: Path, recipe: Recipe, tokenizer: Any, text_encoder: Any, vae: Any, transformer: nn.Module
) -> None:
    """Write the directory through a temporary name. Weights are stored in bfloat16."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    _json(temporary / "model_index.json", INDEX)
    _json(temporary / "kinetoscope.json", {"world": recipe.world.name, "defaults": recipe.defaults})
    tokenizer.save_pretrained(temporary / "tokenizer")
    _half(text_encoder).save_pretrained(temporary / "text_encoder")
    _half(vae).save_pretrained(temporary / "vae")
    scheduler = getattr(diffusers, SCHEDULERS["unipc"])(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=recipe.transformer.sampling_shift
    )
    scheduler.save_pretrained(temporary / "scheduler")
    (temporary / "transformer").mkdir()
    config = {"_class_name": "WanTransformer3DModel", "_diffusers_version": diffusers.__version__}
    _json(temporary / "transformer" / "config.json", config | recipe.transformer.config)
    weights = {k: v.to(torch.bfloat16).contiguous() for k, v in transformer.state_dict().items()}
    save_file(weights, temporary / "transformer" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)


def write_card(folder: Path, recipe: Recipe, path: str, overrides: list[str], facts: dict[str, Any]) -> None:
    """README.md of the model, from recorded facts alone; `kinetoscope eval --card` adds the scores."""
    command = " ".join(["kinetoscope train", path, *(f"--set {o}" for o in overrides)])
    minutes = {part: f"{values['seconds'] / 60:.1f}" for part, values in facts.items()}
    steps = {part: values["steps"] for part, values in facts.items()}
    sizes = {f.parent.name: f.stat().st_size / 2**20 for f in sorted(folder.glob("*/*.safetensors"))}
    world = recipe.world
    lines = [
        f"# {recipe.name}",
        "",
        f"Text-to-video in the Wan 2.1 layout: {world.height}x{world.width} pixels, {world.num_frames} frames, over "
        f"the procedural world `{world.name}`. Trained from nothing by this project's own trainer; no other data or "
        "weights.",
        "",
        f"- command: `{command}` (seed {recipe.seed})",
        f"- hardware: {platform.machine()} CPU, {recipe.threads} threads; torch {torch.__version__}, "
        f"kinetoscope {__version__}",
        f"- wall time, minutes: {', '.join(f'{k} {v}' for k, v in minutes.items())}",
        f"- updates: {', '.join(f'{k} {updates}' for k, updates in steps.items())}",
        f"- autoencoder: {facts['decoder']['psnr_db']:.1f} dB PSNR on clips it was not trained on",
        f"- weights (bfloat16), MB: {', '.join(f'{k} {v:.1f}' for k, v in sizes.items())}",
        f"- defaults: {', '.join(f'{k}={v!r}' for k, v in recipe.defaults.items())}",
        "",
        "![loss curves](loss.png)",
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _half(module: nn.Module) -> Any:
    """The module with its weights rounded to bfloat16, in place: what is measured afterwards is what was shipped."""
    return module.to(torch.bfloat16)


def _json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
