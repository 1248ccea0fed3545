"""A recipe from start to finish: autoencoder, text encoder, latents, transformer, a model directory with its card.

Each part continues from its checkpoint, so the same command also resumes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kinetoscope.core.errors import ConfigError
from kinetoscope.train.curves import draw_curves
from kinetoscope.train.export import export_model, write_card
from kinetoscope.train.flow import FlowTask, prepare_latents
from kinetoscope.train.loop import Progress, train
from kinetoscope.train.recipe import Recipe, load_recipe
from kinetoscope.train.text import TextTask
from kinetoscope.train.vae import DecoderTask, VaeTask

CALIBRATION_SEED = 10**9
"""Clips from here on measure the VAE; training draws seeds below."""


@dataclass(frozen=True, slots=True)
class Folders:
    """Where a recipe keeps things."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def model(self) -> Path:
        return self.root / "model"


def run_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    fresh: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Make the model of a recipe; continues where an earlier run of the same recipe stopped.

    Args:
        path: a YAML file.
        overrides: "section.key=value" each.
        fresh: refuse to continue an earlier run.
        on_progress: called after every step.

    Returns:
        the finished model directory, in diffusers layout.

    Raises:
        ConfigError: the recipe does not read, or its output folder holds a run of another recipe.
        RunCancelled: stopped by a signal; the same command continues.
    """
    recipe = load_recipe(path, overrides)
    folders = Folders(Path(recipe.output))
    _claim(folders.root, recipe, fresh)
    torch.set_num_threads(recipe.threads)
    common: Any = {
        "seed": recipe.seed,
        "checkpoint_minutes": recipe.checkpoint_minutes,
        "on_progress": on_progress,
    }
    facts: dict[str, Any] = {}
    text = TextTask(recipe.text, recipe.world.name, recipe.seed)
    facts["text"] = train(text, recipe.text.optimizer, folders.checkpoints, **common)
    vae = VaeTask(recipe.vae, recipe.world, recipe.seed)
    facts["vae"] = train(vae, recipe.vae.optimizer, folders.checkpoints, **common)
    vae.calibrate(CALIBRATION_SEED)
    latents = prepare_latents(
        vae.module, recipe.world, recipe.transformer.clips, folders.root / "latents.npy", _report(on_progress)
    )
    decoder = DecoderTask(recipe.decoder, vae)
    facts["decoder"] = train(decoder, recipe.decoder.optimizer, folders.checkpoints, **common)
    facts["decoder"] |= vae.psnr(CALIBRATION_SEED)
    flow = FlowTask(recipe.transformer, recipe.world, latents, text.tokenizer, text.module.encoder, recipe.seed)
    facts["transformer"] = train(flow, recipe.transformer.optimizer, folders.checkpoints, **common)
    export_model(folders.model, recipe, text.tokenizer, text.module.encoder, vae.module, flow.module)
    draw_curves(folders.checkpoints, folders.model / "loss.png")
    write_card(folders.model, recipe, str(path), list(overrides), facts)
    return folders.model


def _claim(root: Path, recipe: Recipe, fresh: bool) -> None:
    """Refuse to mix two recipes in one folder."""
    file = root / "recipe.json"
    mine = recipe.model_dump(mode="json", exclude={"output", "threads", "checkpoint_minutes"})
    if file.exists():
        theirs = json.loads(file.read_text(encoding="utf-8"))
        if fresh:
            raise ConfigError(f"{root} already holds a run; delete it or set output=FOLDER to start another")
        if theirs != mine:
            changed = [k for k in mine if mine[k] != theirs.get(k)]
            raise ConfigError(
                f"{root} holds a run with another {', '.join(changed)}; set output=FOLDER, or delete it to start over"
            )
    root.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(mine, indent=1), encoding="utf-8")


def _report(on_progress: Callable[[Progress], None] | None) -> Callable[[int, int], None] | None:
    if on_progress is None:
        return None
    return lambda done, total: on_progress(Progress("latents", done, total, {}, 0.0))
