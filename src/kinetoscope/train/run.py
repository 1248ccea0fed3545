"""A recipe from start to finish: autoencoder and, of captioned clips, text encoder, latents and transformer; a model
directory with its card.

Each part continues from its checkpoint, so the same command also resumes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kinetoscope.core.errors import ConfigError
from kinetoscope.train.basis import fit_basis
from kinetoscope.train.curves import draw_curves
from kinetoscope.train.export import export_played, export_video, write_card
from kinetoscope.train.flow import FlowTask, prepare_latents
from kinetoscope.train.loop import Progress, Task, train
from kinetoscope.train.played import draw_image_encoder, draw_transformer
from kinetoscope.train.recipe import OptimizerSection, PlayedRecipe, Section, VideoRecipe, load_recipe
from kinetoscope.train.text import TextTask
from kinetoscope.train.vae import Clips, DecoderTask, EncoderTask, build_vae, psnr

MEASURED_SEED = 10**9
"""Clips from here on measure (the basis, the autoencoder's error)."""


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


PARTS = {VideoRecipe: ("text", "encoder", "decoder", "transformer"), PlayedRecipe: ("encoder", "decoder")}
"""What is trained, in order."""


def run_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    parts: Sequence[str] = (),
    fresh: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Make the model of a recipe; continues where an earlier run of the same recipe stopped.

    Args:
        path: a YAML file.
        overrides: "section.key=value" each.
        parts: train these of the recipe's `PARTS` only and write no model, so that several processes can share the
            work; the transformer needs text, the others need nothing.
        fresh: refuse to continue an earlier run.
        on_progress: called after every step.

    Returns:
        the finished model directory, in diffusers layout; the folder of the run if `parts` were named.

    Raises:
        ConfigError: the recipe does not read, a part is unknown, or its output folder holds a run of another recipe.
        RunCancelled: stopped by a signal; the same command continues.
    """
    recipe = load_recipe(path, overrides)
    known = PARTS[type(recipe)]
    if unknown := [p for p in parts if p not in known]:
        raise ConfigError(f"unknown part {', '.join(unknown)}; use some of: {', '.join(known)}")
    wanted = [p for p in known if p in parts or not parts or (p == "text" and "transformer" in parts)]
    folders = Folders(Path(recipe.output))
    claim(folders.root, recipe, fresh, {"output", "threads", "checkpoint_minutes"})
    torch.set_num_threads(recipe.threads)
    run = _Run(recipe, folders, wanted, on_progress)
    export = run.video(recipe) if isinstance(recipe, VideoRecipe) else run.played(recipe)
    if parts:
        return folders.root
    run.facts["decoder"]["psnr_db"] = psnr(run.vae, run.clips, range(MEASURED_SEED, MEASURED_SEED + 16))
    export()
    draw_curves(folders.checkpoints, folders.model / "loss.png")
    write_card(folders.model, recipe, str(path), list(overrides), run.facts)
    return folders.model


class _Run:
    """A recipe in progress.

    Attributes:
        facts: of the trainings, by part.
    """

    def __init__(
        self,
        recipe: VideoRecipe | PlayedRecipe,
        folders: Folders,
        wanted: Sequence[str],
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.recipe, self.folders, self.wanted, self.on_progress = recipe, folders, wanted, on_progress
        config = recipe.vae.config
        self.clips = Clips(recipe.world)
        self.basis = fit_basis(
            self.clips.whole, recipe.vae.basis_clips, config["z_dim"], config["scale_factor_spatial"],
            config["scale_factor_temporal"], MEASURED_SEED, recipe.vae.whitening,
        )  # fmt: skip
        self.vae = build_vae(config, recipe.seed)
        self.facts: dict[str, Any] = {}

    def video(self, recipe: VideoRecipe) -> Callable[[], None]:
        """Train the parts of a model of captioned clips; what is returned writes the model, if all were trained."""
        text = TextTask(recipe.text, recipe.world.name, recipe.seed)
        self._fit(text, recipe.text.optimizer)
        self._fit_vae()
        if "transformer" not in self.wanted:
            return lambda: None
        file = self.folders.root / "latents.npy"
        latents = prepare_latents(self.basis, self.clips, recipe.transformer.clips, file, _report(self.on_progress))
        encoder = text.module.encoder
        flow = FlowTask(
            recipe.transformer, recipe.world, latents, self.basis.scale, text.tokenizer, encoder, recipe.seed
        )
        self._fit(flow, recipe.transformer.optimizer)
        return lambda: export_video(self.folders.model, recipe, text.tokenizer, encoder, self.vae, flow.module)

    def played(self, recipe: PlayedRecipe) -> Callable[[], None]:
        """As `video`, of the start of a world that is played."""
        self._fit_vae()
        image_encoder = draw_image_encoder(recipe.image_encoder.config, recipe.seed)
        transformer = draw_transformer(recipe.transformer.config, recipe.seed)
        return lambda: export_played(self.folders.model, recipe, image_encoder, self.vae, transformer)

    def _fit_vae(self) -> None:
        section = self.recipe.vae
        self._fit(EncoderTask(section.encoder, self.vae, self.basis, self.clips), section.encoder.optimizer)
        self._fit(DecoderTask(section.decoder, self.vae, self.basis, self.clips), section.decoder.optimizer)

    def _fit(self, task: Task, section: OptimizerSection) -> None:
        if task.name in self.wanted:
            self.facts[task.name] = train(
                task, section, self.folders.checkpoints,
                seed=self.recipe.seed, precision=self.recipe.precision,
                checkpoint_minutes=self.recipe.checkpoint_minutes, on_progress=self.on_progress,
            )  # fmt: skip


def claim(root: Path, recipe: Section, fresh: bool, changeable: Set[str]) -> None:
    """Take a folder for a recipe: its run is continued, one of another recipe is refused.

    Args:
        fresh: refuse to continue.
        changeable: keys that may differ, "section.key" for those of a section.

    Raises:
        ConfigError: the folder holds a run of another recipe, or of this one if it is to be `fresh`.
    """
    file = root / "recipe.json"
    mine = recipe.model_dump(mode="json")
    if file.exists():
        theirs = _completed(
            json.loads(file.read_text(encoding="utf-8")), mine, recipe.model_dump(exclude_defaults=True)
        )
        if fresh:
            raise ConfigError(f"{root} already holds a run; delete it or set output=FOLDER to start another")
        one, other = _without(mine, changeable), _without(theirs, changeable)
        changed = [k for k in {**one, **other} if one.get(k) != other.get(k)]
        if changed:
            raise ConfigError(
                f"{root} holds a run with another {', '.join(changed)}; set output=FOLDER, or delete it to start over"
            )
    root.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(_without(mine, {"output"}), indent=1), encoding="utf-8")
    temporary.replace(file)


def _completed(theirs: dict[str, Any], mine: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """What a run wrote down before there were some settings, with those that are left at their defaults in `mine`."""
    known = {
        k: _completed(v, mine[k], chosen.get(k) or {}) if isinstance(v, dict) and isinstance(mine.get(k), dict) else v
        for k, v in theirs.items()
    }
    return {**{k: v for k, v in mine.items() if k not in chosen}, **known}


def _without(values: dict[str, Any], keys: Set[str], place: str = "") -> dict[str, Any]:
    """Sections without some keys, each named with its place."""
    return {
        k: _without(v, keys, f"{place}{k}.") if isinstance(v, dict) else v
        for k, v in values.items()
        if place + k not in keys
    }


def _report(on_progress: Callable[[Progress], None] | None) -> Callable[[int, int], None] | None:
    if on_progress is None:
        return None
    return lambda done, total: on_progress(Progress("latents", done, total, {}, 0.0))
