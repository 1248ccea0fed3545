"""What post-training leaves behind: a model directory in diffusers layout, or LoRA files, with a card."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from kinetoscope.core.errors import ConfigError
from kinetoscope.core.file_lock import file_lock
from kinetoscope.core.files import replacing_folder, write_json, write_text
from kinetoscope.core.version import __version__
from kinetoscope.loading import ModelDir, resolve_model
from kinetoscope.loading.directory import file_digest
from kinetoscope.loading.lora_sampling import LoraSampling
from kinetoscope.loading.weights import read_tensors, weight_files
from kinetoscope.train.curves import check_matplotlib, draw_curves
from kinetoscope.train.lora import DIFFUSERS_FILE, save_lora
from kinetoscope.train.post import STUDENT, Made, PostRecipe
from kinetoscope.train.trainer import Trainer

WEIGHTS = "diffusion_pytorch_model{suffix}.safetensors"
STALE = ("README.md", "loss.png", "step_caches.json")
"""Files of a directory that tell of its old transformer."""


def export(trainer: Trainer, weights: Mapping[str, Tensor], folder: Path, logs: Path, made: Made) -> Path:
    """Write the student, with the averaged weights that it holds, through a temporary name.

    Args:
        weights: of its transformer (`Trainer.student_weights`).
        folder: where to; for a LoRA it gets the LoRA's files alone.
        logs: folder of the log.
        made: for the card.

    Returns:
        `folder`.

    Raises:
        OutputError: it cannot be written.
        ConfigError: the family's weights are stored under other names than it is trained with.
    """
    with file_lock(folder):
        return _export(trainer, weights, folder, logs, made)


def _export(trainer: Trainer, weights: Mapping[str, Tensor], folder: Path, logs: Path, made: Made) -> Path:
    student = trainer.roles[STUDENT]
    with replacing_folder(folder) as temporary:
        if student.lora is not None:
            save_lora(student.lora, temporary, export_sampling(trainer))
        else:
            _directory(trainer, weights, temporary)
        draw_curves(logs, temporary / "loss.png")
        card = _card(trainer.recipe, made, student.lora is not None)
        write_text(temporary / "README.md", card)
    return folder


def check_export(trainer: Trainer) -> None:
    """Check what `export` needs, before anything is trained.

    Raises:
        ConfigError: matplotlib is missing, the family's weights are stored under other names than it is trained with,
            or `export.scheduler` is set for a directory without a scheduler.
    """
    check_matplotlib()
    student, section = trainer.roles[STUDENT], trainer.recipe.export
    if student.lora is not None:
        return
    model = student.opened.model
    _check_names(model, model.folder("transformer"), student.opened.transformer.state_dict())
    if section.scheduler and "scheduler" not in model.components():
        raise ConfigError(f"export.scheduler: {model.name} has no scheduler in its model_index.json; leave it out")


def export_sampling(trainer: Trainer) -> LoraSampling | None:
    """How the student is sampled once it is exported, if the recipe says it: as a LoRA's files do."""
    section, model = trainer.recipe.export, trainer.roles[STUDENT].opened.model
    if not section.index and not section.defaults:
        return None
    return LoraSampling(model.model_index["_class_name"], section.index, section.defaults)


def _directory(trainer: Trainer, weights: Mapping[str, Tensor], folder: Path) -> None:
    """The student's directory with another transformer and what the recipe's `export` says."""
    student, section = trainer.roles[STUDENT], trainer.recipe.export
    model = student.opened.model
    transformer = model.folder("transformer")
    old = [f for pattern in ("*.safetensors*", "*.bin*") for f in transformer.glob(pattern)]
    copied = model.copy(folder, [*old, *(model.path / name for name in STALE)])
    write_json(folder / "model_index.json", {**model.model_index, **section.index})
    sidecar = {**copied.sidecar, "defaults": {**model.sidecar.get("defaults", {}), **section.defaults}}
    if section.scheduler:
        file = copied.config_file("scheduler")
        write_json(file, {**json.loads(file.read_text(encoding="utf-8")), **section.scheduler})
    if section.share is not None:
        sidecar["shared"] = _share(copied, section.share)
    write_json(folder / "kinetoscope.json", sidecar)
    dtype = getattr(torch, section.dtype)
    save_torch_state_dict(
        {k: v.to(dtype).contiguous() if v.is_floating_point() else v for k, v in weights.items()},
        copied.folder("transformer"), filename_pattern=WEIGHTS,
    )  # fmt: skip


def _share(model: ModelDir, owner: str) -> dict[str, str]:
    """Remove the components that are those of an embedded model; returns what the sidecar says of them."""
    theirs = resolve_model(owner)
    same = [c for c in model.components() if c in theirs.components() and _contents(model, c) == _contents(theirs, c)]
    for component in same:
        shutil.rmtree(model.folder(component))
    return dict.fromkeys(same, owner)


def _contents(model: ModelDir, component: str) -> dict[Path, str]:
    folder = model.folder(component)
    return {f.relative_to(folder): file_digest(f) for f in folder.rglob("*") if f.is_file()}


def _check_names(model: ModelDir, transformer: Path, weights: Mapping[str, Tensor]) -> None:
    stored = {key for f in weight_files(transformer) for key in _keys(f)}
    if unknown := sorted(set(weights) - stored):
        raise ConfigError(
            f"{model.name} stores its transformer under other names ({unknown[0]} is not among them), and training "
            "writes it under its own only; export a LoRA instead"
        )


def _keys(file: Path) -> list[str]:
    return [stored.key for stored in read_tensors([file])]


def _card(recipe: PostRecipe, made: Made, lora: bool) -> str:
    """README.md, from recorded facts alone; `kinetoscope eval --card` adds the scores."""
    student = recipe.models[STUDENT]
    others = [f"{name} from `{m.init_from}`" for name, m in recipe.models.items() if name != STUDENT]
    settings = {k: v for k, v in recipe.method.model_dump(mode="json").items() if k != "name"}
    kind = "LoRA" if lora else "Model"
    use = f'- use: `kinetoscope generate "PROMPT" --model {student.init_from} --lora {DIFFUSERS_FILE}`'
    lines = [
        f"# {recipe.name}",
        "",
        f"{kind} made from `{student.init_from}` by the method `{recipe.method.name}` of this project's own trainer.",
        "",
        f"- command: `{made.command}` (seed {recipe.seed})",
        f"- method: {_told(settings)}",
        *([f"- other models: {', '.join(others)}"] if others else []),
        f"- data: {_told(recipe.data.model_dump(mode='json'))}",
        f"- steps: {made.steps}, {recipe.loop.accumulate} micro-batches each",
        f"- hardware: {_hardware(recipe)}{_shared(recipe)}; torch {torch.__version__}, kinetoscope {__version__}",
        f"- wall time: {made.seconds / 60:.1f} minutes",
        *([f"- defaults: {_told(recipe.export.defaults)}"] if recipe.export.defaults else []),
        *([use] if lora else []),
        "",
        "![loss curves](loss.png)",
        "",
    ]
    return "\n".join(lines)


def _hardware(recipe: PostRecipe) -> str:
    device = torch.device(recipe.device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {recipe.threads} threads"


def _shared(recipe: PostRecipe) -> str:
    """What several devices were used for."""
    return f" on each of {recipe.parallel.world} ranks ({recipe.parallel})" if recipe.parallel.world > 1 else ""


def _told(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={v!r}" for k, v in values.items() if v not in (None, {}))
