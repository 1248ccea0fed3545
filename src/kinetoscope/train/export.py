"""A finished model as a directory that both Kinetoscope and diffusers load."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import nn

from kinetoscope.core.files import replacing_folder, write_json, write_text
from kinetoscope.core.version import __version__
from kinetoscope.diffusion.scheduler import SCHEDULERS
from kinetoscope.train.recipe import PlayedRecipe, VideoRecipe

VIDEO_INDEX = {
    "_class_name": "WanPipeline",
    "_diffusers_version": diffusers.__version__,
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
PLAYED_INDEX = {
    "_class_name": "MatrixGame2CausalDMDPipeline",
    "_diffusers_version": diffusers.__version__,
    "image_encoder": ["transformers", "CLIPVisionModel"],
    "transformer": ["diffusers", "CausalMatrixGame2WanModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


def export_video(
    folder: Path, recipe: VideoRecipe, tokenizer: Any, text_encoder: Any, vae: Any, transformer: nn.Module
) -> None:
    """Write the directory of a text-to-video model; see `_directory`."""
    with _directory(folder, recipe, VIDEO_INDEX, vae, transformer) as temporary:
        tokenizer.save_pretrained(temporary / "tokenizer")
        _half(text_encoder).save_pretrained(temporary / "text_encoder")
        scheduler = getattr(diffusers, SCHEDULERS["unipc"])(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=recipe.transformer.sampling_shift
        )
        scheduler.save_pretrained(temporary / "scheduler")


def export_played(folder: Path, recipe: PlayedRecipe, image_encoder: Any, vae: Any, transformer: nn.Module) -> None:
    """Write the directory of a world that is played; see `_directory`."""
    with _directory(folder, recipe, PLAYED_INDEX, vae, transformer) as temporary:
        _half(image_encoder).save_pretrained(temporary / "image_encoder")


@contextmanager
def _directory(
    folder: Path, recipe: VideoRecipe | PlayedRecipe, index: dict[str, Any], vae: Any, transformer: nn.Module
) -> Iterator[Path]:
    """Yield a directory in diffusers layout, which becomes `folder` at the end. Weights are stored in bfloat16."""
    with replacing_folder(folder) as temporary:
        write_json(temporary / "model_index.json", index)
        write_json(temporary / "kinetoscope.json", {"world": recipe.world.name, "defaults": recipe.defaults})
        _half(vae).save_pretrained(temporary / "vae")
        (temporary / "transformer").mkdir()
        config = {"_class_name": index["transformer"][1], "_diffusers_version": diffusers.__version__}
        write_json(temporary / "transformer" / "config.json", config | recipe.transformer.config)
        weights = {k: v.to(torch.bfloat16).contiguous() for k, v in transformer.state_dict().items()}
        save_file(weights, temporary / "transformer" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        yield temporary


def write_card(
    folder: Path, recipe: VideoRecipe | PlayedRecipe, path: str, overrides: list[str], facts: dict[str, Any]
) -> None:
    """README.md of the model, from recorded facts alone; `kinetoscope eval --card` adds the scores."""
    command = " ".join(["kinetoscope train", path, *(f"--set {o}" for o in overrides)])
    minutes = {part: f"{values['seconds'] / 60:.1f}" for part, values in facts.items()}
    steps = {part: values["steps"] for part, values in facts.items()}
    sizes = {f.parent.name: f.stat().st_size / 2**20 for f in sorted(folder.glob("*/*.safetensors"))}
    world = recipe.world
    if isinstance(recipe, VideoRecipe):
        what = (
            f"Text-to-video in the Wan 2.1 layout: {world.height}x{world.width} pixels, {world.num_frames} frames, "
            f"over the procedural world `{world.name}`. Trained from nothing by this project's own trainer; no other "
            "data or weights."
        )
    else:
        what = (
            f"The start of a model that plays the procedural world `{world.name}`, in the Matrix-Game 2 layout: its "
            "autoencoder is trained, its image encoder tells nothing of the image, its transformer is for "
            "post-training."
        )
    lines = [
        f"# {recipe.name}",
        "",
        what,
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
    write_text(folder / "README.md", "\n".join(lines))


def _half(module: nn.Module) -> Any:
    """The module with its weights rounded to bfloat16, in place: what is measured afterwards is what was shipped."""
    return module.to(torch.bfloat16)
