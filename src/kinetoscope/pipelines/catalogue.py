"""The models that run by name: embedded ones, and published ones with tasks, defaults and what they were checked by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kinetoscope.core.types import SamplingParams
from kinetoscope.loading import ModelDir, resolve_model
from kinetoscope.models.cosmos import spec as cosmos
from kinetoscope.models.hunyuan import spec as hunyuan
from kinetoscope.models.hunyuan15 import spec as hunyuan15
from kinetoscope.models.longcat import spec as longcat
from kinetoscope.models.ltx import spec as ltx
from kinetoscope.models.matrix_game import spec as matrix_game
from kinetoscope.models.skyreels import spec as skyreels
from kinetoscope.models.wan import distilled
from kinetoscope.models.wan import spec as wan
from kinetoscope.pipelines.presets import pipeline_class
from kinetoscope.reference import embedded_models

T2V, I2V, FLF2V, V2V, VC = ("t2v",), ("i2v",), ("flf2v",), ("v2v",), ("vc",)


@dataclass(frozen=True, slots=True)
class Family:
    """Published models that share a transformer.

    Attributes:
        presets: model id -> defaults.
        tasks: part of a model id -> what such models do; the first part that fits decides, "" fits all.
        oracle: what the family's results are compared with in the tests, on random weights.
    """

    presets: Mapping[str, SamplingParams]
    tasks: Mapping[str, tuple[str, ...]]
    oracle: str

    def tasks_of(self, name: str) -> tuple[str, ...]:
        """What a model does."""
        return next(tasks for part, tasks in self.tasks.items() if part in name)


FAMILIES: tuple[Family, ...] = (
    Family(
        wan.PRESETS,
        {"TI2V": T2V + V2V + I2V, "2.2-I2V": I2V + FLF2V, "I2V": I2V, "FLF2V": FLF2V, "": T2V + V2V},
        "diffusers",
    ),
    Family({wan.FUN_CONTROL: wan.FUN_PRESETS[wan.FUN_CONTROL]}, {"": ("control",)}, "recorded runs"),
    Family(distilled.FEW_STEP_PRESETS, {"TI2V": T2V + I2V, "I2V": I2V, "": T2V}, "recorded runs"),
    Family(distilled.CAUSAL_PRESETS, {"I2V": I2V, "": T2V + I2V}, "recorded runs"),
    Family(skyreels.PRESETS, {"-DF-": T2V + I2V + FLF2V + VC, "I2V": I2V + FLF2V, "": T2V}, "diffusers"),
    Family(hunyuan.PRESETS, {"I2V": I2V, "": T2V}, "diffusers"),
    Family(hunyuan15.PRESETS, {"i2v": I2V, "": T2V}, "diffusers"),
    Family(
        cosmos.PRESETS,
        {"Text2World": T2V, "Text2Image": ("t2i",), "Video2World": I2V + VC, "": T2V + I2V + VC},
        "diffusers",
    ),
    Family(longcat.PRESETS, {"": T2V + I2V + VC + ("refine",)}, "recorded runs"),
    Family(matrix_game.PRESETS, {"": I2V}, "recorded runs"),
    Family(ltx.PRESETS, {"": T2V + I2V}, "diffusers"),
)


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model that runs by name.

    Attributes:
        where: "embedded" or "hub".
        status: what is known of it here: its own scores, or what the code was compared with.
    """

    name: str
    tasks: tuple[str, ...]
    defaults: SamplingParams
    where: str
    status: str


def find_model(name_or_path: str | Path) -> ModelDir:
    """Return the directory of a model (`loading.resolve_model`); an error names the nearest model that runs by name.

    Raises:
        ModelLoadError: there is no such model, or its directory has no `model_index.json`.
    """
    return resolve_model(name_or_path, [name for family in FAMILIES for name in family.presets])


def published_defaults(name: str) -> SamplingParams | None:
    """Return the sampling defaults of the published model of that hub id; None if no family knows it."""
    return next((family.presets[name] for family in FAMILIES if name in family.presets), None)


def known_models() -> list[KnownModel]:
    """The embedded models, then the published ones that have presets.

    Raises:
        ModelLoadError: an embedded directory is damaged.
    """
    found: list[KnownModel] = []
    for name, path in embedded_models().items():
        model = ModelDir(path, name)
        tasks = pipeline_class(model).tasks
        found.append(KnownModel(name, tasks, SamplingParams(**model.defaults), "embedded", "trained and scored here"))
    for family in FAMILIES:
        for name, params in family.presets.items():
            status = f"equal to {family.oracle} on random weights"
            found.append(KnownModel(name, family.tasks_of(name), params, "hub", status))
    return found
