"""A recipe from start to finish: autoencoder and, of captioned clips, text encoder, latents and transformer; a model
directory with its card.

Each part continues from its checkpoint, so the same command also resumes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from kinetoscope.core.errors import ConfigError
from kinetoscope.core.extensions import load_extensions
from kinetoscope.core.file_lock import file_lock
from kinetoscope.train.basis import fit_basis
from kinetoscope.train.curves import check_matplotlib, draw_curves
from kinetoscope.train.export import export_played, export_video, write_card
from kinetoscope.train.flow import FlowTask, check_transformer, prepare_latents
from kinetoscope.train.loop import Progress, Task, train
from kinetoscope.train.output_folder import OutputFolder
from kinetoscope.train.played import draw_image_encoder, draw_transformer
from kinetoscope.train.recipe import OptimizerSection, PlayedRecipe, VideoRecipe, load_recipe
from kinetoscope.train.run_inputs import FileDigests, RunInputs, environment, text_digest
from kinetoscope.train.text import TextTask
from kinetoscope.train.vae import Clips, DecoderTask, EncoderTask, build_vae, psnr

MEASURED_SEED = 10**9
"""Clips from here on measure (the basis, the autoencoder's error)."""


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
    load_extensions()
    recipe = load_recipe(path, overrides)
    known = PARTS[type(recipe)]
    if unknown := [p for p in parts if p not in known]:
        raise ConfigError(f"unknown part {', '.join(unknown)}; use some of: {', '.join(known)}")
    wanted = [p for p in known if p in parts or not parts or (p == "text" and "transformer" in parts)]
    folder = OutputFolder(Path(recipe.output), recipe, {"output", "threads", "checkpoint_minutes"})
    folder.check(fresh=fresh)
    torch.set_num_threads(recipe.threads)
    run = _VideoRun if isinstance(recipe, VideoRecipe) else _PlayedRun
    run = run(recipe, folder, wanted, on_progress)  # pyright: ignore[reportArgumentType] - the recipe's own
    inputs = run.inputs()
    folder.check_inputs(inputs, resumes=any(folder.checkpoints.glob("*.pt")))
    folder.claim(inputs)
    run.train()
    if parts:
        return folder.root
    run.facts["decoder"]["psnr_db"] = psnr(run.vae, run.clips, range(MEASURED_SEED, MEASURED_SEED + 16))
    with file_lock(folder.model):
        run.export()
        draw_curves(folder.checkpoints, folder.model / "loss.png")
        write_card(folder.model, recipe, str(path), list(overrides), run.facts)
    return folder.model


RecipeT = TypeVar("RecipeT", VideoRecipe, PlayedRecipe)


class _Run(ABC, Generic[RecipeT]):
    """A recipe in progress. All that can fail for a mistake in the recipe is made here, before anything is trained.

    Attributes:
        facts: of the trainings, by part.

    Raises:
        ConfigError: a network cannot be made as the recipe says, or networks do not fit each other.
    """

    def __init__(
        self,
        recipe: RecipeT,
        folder: OutputFolder,
        wanted: Sequence[str],
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        check_matplotlib()
        self.recipe, self.folder, self.wanted, self.on_progress = recipe, folder, wanted, on_progress
        config = recipe.vae.config
        self.clips = Clips(recipe.world)
        self.basis = fit_basis(
            self.clips.whole, recipe.vae.basis_clips, config["z_dim"], config["scale_factor_spatial"],
            config["scale_factor_temporal"], MEASURED_SEED, recipe.vae.whitening,
        )  # fmt: skip
        self.vae = build_vae(config, recipe.seed)
        self.facts: dict[str, Any] = {}

    @abstractmethod
    def train(self) -> None:
        """Train the parts that are wanted."""

    @abstractmethod
    def export(self) -> None:
        """Write the model, of which all parts were trained."""

    def inputs(self) -> RunInputs:
        """Return digests of what the recipe's world draws and says."""
        clip = self.clips.sample(0)
        digests = {"world": text_digest(sha256(clip.frames.tobytes()).hexdigest(), clip.caption)}
        return RunInputs(digests, environment(threads=self.recipe.threads), FileDigests())

    def _fit_vae(self) -> None:
        section = self.recipe.vae
        self._fit(EncoderTask(section.encoder, self.vae, self.basis, self.clips), section.encoder.optimizer)
        self._fit(DecoderTask(section.decoder, self.vae, self.basis, self.clips), section.decoder.optimizer)

    def _fit(self, task: Task, section: OptimizerSection) -> None:
        """Train a part, while no other process trains the same one; what another has trained is not trained again."""
        if task.name not in self.wanted:
            return
        checkpoints = self.folder.checkpoints
        with file_lock(checkpoints / task.name):
            self.facts[task.name] = train(
                task, section, checkpoints,
                seed=self.recipe.seed, precision=self.recipe.precision,
                checkpoint_minutes=self.recipe.checkpoint_minutes, on_progress=self.on_progress,
            )  # fmt: skip


class _VideoRun(_Run[VideoRecipe]):
    """A model of captioned clips."""

    def __init__(self, recipe: VideoRecipe, *more: Any) -> None:
        super().__init__(recipe, *more)
        self.text = TextTask(recipe.text, recipe.world.name, recipe.seed)
        self.flow: FlowTask | None = None
        check_transformer(recipe)

    def train(self) -> None:
        recipe = self.recipe
        self._fit(self.text, recipe.text.optimizer)
        self._fit_vae()
        if "transformer" not in self.wanted:
            return
        file, report = self.folder.root / "latents.npy", _report(self.on_progress)
        latents = prepare_latents(lambda: self.basis, self.clips, recipe.transformer.clips, file, report)
        self.flow = FlowTask(
            recipe.transformer, recipe.world, latents, self.basis.scale, self.text.tokenizer, self.text.module.encoder,
            recipe.seed,
        )  # fmt: skip
        self._fit(self.flow, recipe.transformer.optimizer)

    def export(self) -> None:
        assert self.flow is not None
        encoder = self.text.module.encoder
        export_video(self.folder.model, self.recipe, self.text.tokenizer, encoder, self.vae, self.flow.module)


class _PlayedRun(_Run[PlayedRecipe]):
    """The start of a world that is played."""

    def __init__(self, recipe: PlayedRecipe, *more: Any) -> None:
        super().__init__(recipe, *more)
        self.image_encoder = draw_image_encoder(recipe.image_encoder.config, recipe.seed)
        self.transformer = draw_transformer(recipe.transformer.config, recipe.seed)

    def train(self) -> None:
        self._fit_vae()

    def export(self) -> None:
        export_played(self.folder.model, self.recipe, self.image_encoder, self.vae, self.transformer)


def _report(on_progress: Callable[[Progress], None] | None) -> Callable[[int, int], None] | None:
    if on_progress is None:
        return None
    return lambda done, total: on_progress(Progress("latents", done, total, {}, 0.0))
