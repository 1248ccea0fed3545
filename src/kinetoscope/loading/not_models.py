"""What a path is that is not a model directory, and what to do with it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from kinetoscope.core.errors import ModelLoadError
from kinetoscope.loading.weight_formats import (
    describe_format,
    describe_layout,
    describe_other_weights,
)
from kinetoscope.loading.weights import read_headers

INDEX = "model_index.json"
LORA_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
"""What PEFT and diffusers save into a folder."""
_CHECKPOINT = re.compile(r"step-\d+(\.pt)?")
_SINGLE_FILE = (
    "a model in one file is not read: convert it with diffusers, "
    "PIPELINE.from_single_file(FILE).save_pretrained(FOLDER), and give the folder"
)


def describe_file(file: Path) -> str:
    """Say what a file is that was given as a model, and what to give instead; a whole message."""
    if file.name == INDEX:
        return f"{file} is a file; give the directory that holds it: {file.parent}"
    if file.suffix == ".safetensors":
        try:
            keys = list(read_headers([file]))
        except ModelLoadError as error:
            return str(error)
        if (hint := describe_layout(keys)) and "LoRA" in hint:
            return f"{file} is a file and no model: {hint}"
        return f"{file} is a file; {_SINGLE_FILE}"
    if what := describe_format(file):
        return f"{file} is a file ({what}); {_SINGLE_FILE}"
    return f"{file} is a file; give the directory that holds {INDEX}"


def describe_folder(folder: Path) -> str:
    """Say what a directory without `model_index.json` holds, and what to give instead; a whole message."""
    says = f"{folder} has no {INDEX}, so it is not a model in diffusers layout"
    if inner := sorted(p.parent.name for p in folder.glob(f"*/{INDEX}")):
        return f"{says}; did you mean {folder / inner[0]}?"
    names = sorted(f.name for f in folder.iterdir())
    if not names:
        return f"{says}: it is empty"
    if lora := next((name for name in LORA_FILES if name in names), None):
        return f"{says}: it holds a LoRA ({lora}), which changes a model; give the folder as lora= (--lora)"
    if checkpoint := next((name for name in names if _CHECKPOINT.fullmatch(name)), None):
        return (
            f"{says}: it holds the checkpoints of a training ({checkpoint}), which `kinetoscope train` goes on from; "
            "give the model that the training exports at its end"
        )
    if (folder.parent / INDEX).is_file() and "config.json" in names:
        return f"{says}: it is one component; did you mean {folder.parent}?"
    if state := next((n for n in names if re.match(r"(optimizer|random_states|training_args)\b", n)), None):
        return f"{says}: it holds the state of a training ({state}); give the model that the training saved at its end"
    if class_name := _class_of(folder):
        return (
            f"{says}: it is one component ({class_name}) or a repository in its authors' own layout; give the whole "
            "model in diffusers layout (on the hub often a repository whose name ends with -Diffusers)"
        )
    if single := next((n for n in names if n.endswith(".safetensors")), None):
        return f"{says}: it holds {single}; {_SINGLE_FILE}"
    return says + describe_other_weights(folder, otherwise="")


def _class_of(folder: Path) -> str | None:
    try:
        config: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return str(config.get("_class_name") or config["architectures"][0])
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None
