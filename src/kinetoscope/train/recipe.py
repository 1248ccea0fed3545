"""Recipes: YAML files with typed sections, and dotted overrides on the command line."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from kinetoscope.core.errors import ConfigError
from kinetoscope.core.types import SamplingParams
from kinetoscope.core.yaml_files import read_sections

Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""A seed from which those of steps are mixed; all of its bits count."""
Beta = Annotated[float, Field(ge=0, lt=1)]


def _known_sampling_fields(values: dict[str, Any]) -> dict[str, Any]:
    known = [f.name for f in fields(SamplingParams)]
    if unknown := [name for name in values if name not in known]:
        raise ValueError(f"unknown sampling parameter {unknown[0]}; the known ones are: {', '.join(known)}")
    return values


SamplingFields = Annotated[dict[str, Any], AfterValidator(_known_sampling_fields)]
"""Values of fields of `SamplingParams` by name."""


class Section(BaseModel):
    """Base of all sections: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class OptimizerSection(Section):
    """AdamW with linear warm-up and cosine decay, and a moving average of the weights.

    Attributes:
        steps: updates of the schedule. In a training that goes on longer the learning rate stays at its last value.
        restarts: updates after which warm-up and decay begin anew (arXiv 1608.03983). Adding a restart at the end of
            a finished training continues it, and the recipe still tells the whole of it. Those at `steps` or later
            have no effect.
        learning_rate: the highest.
        warmup: updates from zero to it.
        final_fraction: the last learning rate as a fraction of the highest.
        clip: largest gradient norm.
        ema: decay of the moving average of weights; 0 keeps the last weights.
    """

    steps: Positive
    restarts: list[Positive] = []
    learning_rate: float = Field(gt=0)
    warmup: int = Field(50, ge=0)
    final_fraction: float = Field(0.02, ge=0, le=1)
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, gt=0)
    ema: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _in_order(self) -> OptimizerSection:
        if any(a >= b for a, b in itertools.pairwise(self.restarts)):
            raise ValueError(f"restarts must rise, got {self.restarts}")
        return self

    def cycle(self, step: int) -> tuple[int, int]:
        """Return the first update, and the one after the last, of the cycle that `step` is in; after the last cycle
        those of the last one."""
        marks = [0, *(r for r in self.restarts if r < self.steps), self.steps]
        return max(m for m in marks[:-1] if m <= step), min((m for m in marks[1:] if m > step), default=self.steps)


class WorldSection(Section):
    """Clips of a procedural world."""

    name: str
    height: Positive = 64
    width: Positive = 64
    num_frames: Positive = 33
    fps: float = Field(12.0, gt=0)


class ClipMix(Section):
    """One kind of batch, drawn with a probability proportional to `weight` once `start` updates are over."""

    frames: Positive
    batch: Positive
    weight: float = Field(1.0, gt=0)
    start: int = Field(0, ge=0)


def _drawn_from_the_start(kinds: list[ClipMix]) -> list[ClipMix]:
    if not kinds or min(kind.start for kind in kinds):
        raise ValueError("batches needs a kind with start: 0, which the first updates draw")
    return kinds


ClipMixes = Annotated[list[ClipMix], AfterValidator(_drawn_from_the_start)]


class EncoderSection(Section):
    """Training of the encoder half."""

    optimizer: OptimizerSection
    batches: ClipMixes


class DecoderSection(Section):
    """Training of the decoder half.

    Attributes:
        noise: standard deviation added to the normalised latents, as a transformer's are never exact.
        l1, l2: weights of the loss terms.
    """

    optimizer: OptimizerSection
    batches: ClipMixes
    noise: float = Field(0.05, ge=0)
    l1: float = 1.0
    l2: float = 1.0


class VaeSection(Section):
    """A video autoencoder whose latents are principal components of blocks of pixels.

    Attributes:
        config: fields of diffusers' `AutoencoderKLWan`.
        basis_clips: clips over which the components are measured.
        whitening: see `train.basis.Basis`.
    """

    config: dict[str, Any]
    basis_clips: Positive = 512
    whitening: float = Field(1.0, ge=0, le=1)
    encoder: EncoderSection
    decoder: DecoderSection

    @model_validator(mode="after")
    def _sizes(self) -> VaeSection:
        for name in ("z_dim", "scale_factor_spatial", "scale_factor_temporal"):
            value = self.config.get(name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"config.{name}={value!r} must be a positive whole number")
        return self


class TextSection(Section):
    """A text encoder.

    Attributes:
        config: fields of transformers' `UMT5Config`; the vocabulary comes from the world.
        mask: fraction of tokens hidden for the encoder to guess.
    """

    config: dict[str, Any]
    optimizer: OptimizerSection
    batch: Positive = 64
    mask: float = Field(0.2, gt=0, lt=1)


class NoiseLevels(Section):
    """How noisy clips are shown from update `start` on, and what of the error counts.

    Attributes:
        shift: of the logit-normal levels (arXiv 2403.03206): above 1 more noise.
        logit_mean, logit_std: before the shift.
        emphasis: a latent channel's error counts with this power of the deviation that its component has in pixels;
            0: all alike, as the latents are.
    """

    start: int = Field(0, ge=0)
    shift: float = Field(3.0, gt=0)
    logit_mean: float = 0.0
    logit_std: float = Field(1.0, gt=0)
    emphasis: float = Field(0.0, ge=0)


class TransformerSection(Section):
    """A flow-matching transformer on precomputed latents.

    Attributes:
        config: fields of the published Wan transformer configuration.
        batches: kinds of batches; those of fewer frames take the beginning of clips.
        clips: clips rendered and encoded once; each epoch words its captions anew.
        levels: noise levels, the first from the start.
        sampling_shift: of the finished model's schedule.
        caption_dropout: fraction of samples that read the empty prompt.
    """

    config: dict[str, Any]
    optimizer: OptimizerSection
    batches: ClipMixes
    clips: Positive = 8192
    levels: list[NoiseLevels] = Field(default_factory=lambda: [NoiseLevels.model_validate({})])
    sampling_shift: float = Field(3.0, gt=0)
    caption_dropout: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _from_the_start(self) -> TransformerSection:
        if not self.levels or self.levels[0].start:
            raise ValueError("the first of levels must start at 0")
        if any(a.start >= b.start for a, b in itertools.pairwise(self.levels)):
            raise ValueError(f"the starts of levels must rise, got {[level.start for level in self.levels]}")
        return self


class ImageEncoderSection(Section):
    """An image encoder with drawn weights, which nothing trains and which tells nothing of its image.

    Attributes:
        config: fields of transformers' `CLIPVisionConfig`.
    """

    config: dict[str, Any]


class PlayedSection(Section):
    """A Matrix-Game transformer that post-training begins with.

    Attributes:
        config: fields of the published configuration.
    """

    config: dict[str, Any]


class Recipe(Section):
    """What makes a reference model over a world.

    Attributes:
        name: of the model.
        output: folder of checkpoints, logs, curves and the finished model.
        defaults: sampling defaults written beside the model.
        precision: of the forward passes; bfloat16 is far slower than float32 on a CPU without instructions for it.
        checkpoint_minutes: time between checkpoints.
    """

    name: str
    output: str
    seed: Seed = 0
    threads: Positive = 2
    precision: Literal["float32", "bfloat16"] = "float32"
    checkpoint_minutes: float = Field(2.0, gt=0)
    world: WorldSection
    vae: VaeSection
    defaults: SamplingFields

    @model_validator(mode="after")
    def _clips_fit(self) -> Recipe:
        world, vae = self.world, self.vae.config
        if (world.num_frames - 1) % vae["scale_factor_temporal"]:
            raise ValueError(
                f"world.num_frames={world.num_frames}: use 1 + a multiple of {vae['scale_factor_temporal']} "
                "(vae.config.scale_factor_temporal)"
            )
        for side in ("height", "width"):
            if (pixels := getattr(world, side)) % vae["scale_factor_spatial"]:
                raise ValueError(f"world.{side}={pixels}: use a multiple of {vae['scale_factor_spatial']}")
        for place, kinds in self.clip_mixes().items():
            for kind in kinds:
                if kind.frames > world.num_frames or (kind.frames - 1) % vae["scale_factor_temporal"]:
                    raise ValueError(
                        f"{place}: batches of {kind.frames} frames; use 1 + a multiple of "
                        f"{vae['scale_factor_temporal']}, and at most the {world.num_frames} frames of a clip "
                        "(world.num_frames)"
                    )
        return self

    def clip_mixes(self) -> dict[str, list[ClipMix]]:
        """Return the kinds of batches of each training, by their place in the recipe."""
        return {"vae.encoder.batches": self.vae.encoder.batches, "vae.decoder.batches": self.vae.decoder.batches}


class VideoRecipe(Recipe):
    """A model of captioned clips, whole."""

    text: TextSection
    transformer: TransformerSection

    def clip_mixes(self) -> dict[str, list[ClipMix]]:
        return {**super().clip_mixes(), "transformer.batches": self.transformer.batches}


class PlayedRecipe(Recipe):
    """The start of a model of a world that is played: all but what its transformer learns, by a recipe of
    post-training."""

    image_encoder: ImageEncoderSection
    transformer: PlayedSection


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> VideoRecipe | PlayedRecipe:
    """A recipe from a YAML file: of a world that is played if it has an `image_encoder`.

    Args:
        path: the file.
        overrides: "section.key=value" each; values are YAML.

    Raises:
        ConfigError: the file is missing or not YAML, or a key or value does not fit; the message names the place and
            the nearest key.
    """
    data = read_recipe(path, overrides)
    return validated(PlayedRecipe if "image_encoder" in data else VideoRecipe, data, path)


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The sections of a YAML file, with overrides, not yet checked.

    Raises:
        ConfigError: the file is missing or not YAML, or an override does not fit.
    """
    return read_sections(path, overrides, "recipe")


SectionT = TypeVar("SectionT", bound=Section)


def validated(kind: type[SectionT], data: Any, path: str | Path, place: str = "") -> SectionT:
    """`data` as a section.

    Args:
        place: of the section in the file, with a dot at the end, for messages.

    Raises:
        ConfigError: a key or value does not fit; the message names the place and the nearest key.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        problems = "; ".join(_explain(e, kind, place) for e in error.errors())
        raise ConfigError(f"recipe {path}: {problems}") from error


def _explain(error: Any, kind: type[Section], place: str) -> str:
    where = place + ".".join(str(p) for p in error["loc"])
    if error["type"] != "extra_forbidden":
        return f"{where}: {error['msg']}"
    key = str(error["loc"][-1])
    keys = {name for section in (kind, *_sections(Section)) for name in section.model_fields} - {key}
    parts = [(n, f.annotation) for n, f in kind.model_fields.items()]
    homes = [f"{n}.{key}" for n, a in parts if isinstance(a, type) and issubclass(a, Section) and key in a.model_fields]
    near = homes or difflib.get_close_matches(key, sorted(keys), n=1)
    return f"unknown key {where}" + (f"; did you mean {near[0]}?" if near else "")


def _sections(kind: type[Section]) -> set[type[Section]]:
    """All known subclasses."""
    return {kind}.union(*(_sections(k) for k in kind.__subclasses__()))
