"""Recipes of post-training: YAML files with a `method` section."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator, model_validator

from kinetoscope.core.errors import ConfigError
from kinetoscope.parallel import ParallelConfig
from kinetoscope.reference import embedded_models
from kinetoscope.train.causalize import CausalSection
from kinetoscope.train.data import DataSection, source_class
from kinetoscope.train.methods import MethodSettings, check_roles, method_class
from kinetoscope.train.recipe import OptimizerSection, Positive, SamplingFields, Section, Seed, read_recipe, validated
from kinetoscope.train.roles import Uncond

STUDENT = "student"
"""The role that is exported."""


class RoleOptimizer(OptimizerSection):
    """As `OptimizerSection`; the schedule is as long as the loop unless `steps` says otherwise.

    A shorter schedule leaves the learning rate at its last value for the rest of the loop, a longer one is cut off.
    """

    steps: int = Field(default=0, ge=0)


class LoraSection(Section):
    """Low-rank changes in place of full training (arXiv 2106.09685).

    Attributes:
        rank: r.
        alpha: the change is alpha / r times the product of the matrices; None: r.
        targets: parts of the names of the linear layers that get one.
    """

    rank: Positive = 16
    alpha: float | None = Field(default=None, gt=0)
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net")


class ModelSection(Section):
    """A model in a role.

    Attributes:
        init_from: an embedded name, a directory or a hub id.
        transformer: a folder or .safetensors file whose weights are used in place of the directory's own.
        causal: make it a causal model that begins with these weights (`train.causalize`); its directory is kept in the
            run's folder under the role's name.
        trainable: whether it has an optimizer.
        attention: "dense", or a sparse kind with its settings ("vsa:sparsity=0.8").
        shift: of noise levels; None: that of the family.
        uncond: what the unconditional branch reads.
        checkpointing: recompute blocks in the backward pass, for less memory, in rollouts with a cache too.
        compile: generate fused kernels of the blocks (`torch.compile`), for less time; the first updates take a minute.
        lora: train low-rank changes of it alone.
        optimizer: its own, in place of the recipe's.
    """

    init_from: str
    transformer: str | None = None
    causal: CausalSection | None = None
    trainable: bool = False
    attention: str = "dense"
    shift: float | None = Field(default=None, gt=0)
    uncond: Uncond = "negative"
    checkpointing: bool = False
    compile: bool = False
    lora: LoraSection | None = None
    optimizer: RoleOptimizer | None = None


class LoopSection(Section):
    """The loop.

    Attributes:
        steps: how many there are; each updates the roles that the method says.
        accumulate: micro-batches whose gradients make an update.
        precision: of the forward passes; weights, optimizers and losses are float32.
        log_every: steps between lines of the log.
    """

    steps: Positive
    accumulate: Positive = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    log_every: Positive = 1


class CheckpointSection(Section):
    """Checkpoints.

    Attributes:
        minutes: between two of them.
        every: steps between two of them, beside those by the clock; 0: by the clock alone.
        keep: how many of the newest stay.
    """

    minutes: float = Field(default=5.0, gt=0)
    every: int = Field(default=0, ge=0)
    keep: Positive = 2


class ValidationSection(Section):
    """Videos of the student in training, with its averaged weights: a contact sheet each time, and, of a world, the
    scores of its judge as `kinetoscope eval` tells them (`train.validation`).

    Attributes:
        every: steps between validations; 0: none.
        prompts: of the videos, one each; none: captions, or games, of the world that the model's directory names.
        images: first frames (paths or addresses), for models that take one: one for all prompts or one each. Models
            that read no prompts make a video of each image.
        videos: how many of the world.
        params: sampling parameters, over those of the export; in `extra` those of the family, for instance the
            `actions` of a world that is played.
    """

    every: int = Field(default=0, ge=0)
    prompts: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    videos: Positive = 8
    params: SamplingFields = Field(default_factory=dict)


class CallbacksSection(Section):
    """What happens beside the loop.

    Attributes:
        tensorboard, wandb: whether losses go there; None: if the package is installed, and wandb's then stay in the
            folder of the run.
    """

    validation: ValidationSection = ValidationSection()
    tensorboard: bool | None = None
    wandb: bool | None = None


class ExportSection(Section):
    """The finished model.

    Attributes:
        dtype: of the weights of its transformer.
        defaults: sampling defaults, over those of the directory it was made from.
        index: entries of model_index.json, over those of that directory. A LoRA's files say both in their headers.
        scheduler: entries of its scheduler's configuration, likewise.
        share: an embedded model; components that are the same as its own are not written, but taken from it.
    """

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    defaults: SamplingFields = Field(default_factory=dict)
    index: dict[str, Any] = Field(default_factory=dict)
    scheduler: dict[str, Any] = Field(default_factory=dict)
    share: str | None = None

    @field_validator("share")
    @classmethod
    def _embedded(cls, share: str | None) -> str | None:
        if share is not None and share not in embedded_models():
            raise ValueError(f"{share!r} is no embedded model: {', '.join(embedded_models())}")
        return share


class PostRecipe(Section):
    """Everything that makes a model out of another.

    Attributes:
        name: of the model.
        output: folder of checkpoints, logs, curves and the finished model.
        threads: of the CPU.
        device: where the models are.
        models: the roles; "student" is the one that is exported.
        optimizer: of every trainable role that has none of its own.
        parallel: how several devices share the training: a layout as inference's, of `replicas`, which take different
            micro-batches of an update, `ulysses` and `ring`, which share the tokens of each, and `fsdp`.
    """

    name: str
    output: str
    seed: Seed = 0
    threads: Positive = 1
    device: str = "cpu"
    models: dict[str, ModelSection]
    method: SerializeAsAny[MethodSettings]
    data: SerializeAsAny[DataSection]
    optimizer: RoleOptimizer
    loop: LoopSection
    parallel: Annotated[ParallelConfig, BeforeValidator(ParallelConfig.of)] = ParallelConfig()
    checkpoint: CheckpointSection = CheckpointSection()
    callbacks: CallbacksSection = CallbacksSection()
    export: ExportSection = ExportSection()

    @model_validator(mode="after")
    def _roles(self) -> PostRecipe:
        if STUDENT not in self.models or not self.models[STUDENT].trainable:
            raise ValueError("models needs a student that is trainable")
        for name, model in self.models.items():
            options = {"lora": model.lora, "optimizer": model.optimizer, "checkpointing": model.checkpointing}
            if not model.trainable and (unread := [option for option, value in options.items() if value]):
                raise ValueError(f"models.{name} has {_article(unread[0])} but is not trainable")
            if name != STUDENT and model.optimizer is not None and model.optimizer.ema:
                raise ValueError(f"models.{name}.optimizer.ema has no effect: the average of the student alone is used")
        return self

    @model_validator(mode="after")
    def _lora(self) -> PostRecipe:
        if not self.models[STUDENT].lora:
            return self
        if self.export.scheduler:
            raise ValueError("export.scheduler is of a directory; the file of a LoRA says defaults and index alone")
        if self.export.share:
            raise ValueError(f"export.share={self.export.share} is of a directory; a LoRA is exported as a file alone")
        if "dtype" in self.export.model_fields_set and self.export.dtype != "float32":
            raise ValueError(f"export.dtype={self.export.dtype} is of a directory; a LoRA is exported in float32")
        return self

    @model_validator(mode="after")
    def _read_by_the_method(self) -> PostRecipe:
        for place, why in self.method.unread_options().items():
            role, _, option = place.partition(".")
            if role not in self.models:
                continue
            value: Any = getattr(self.models[role], option)
            if value != ModelSection.model_fields[option].default:
                raise ValueError(f"models.{place}={value} has no effect: {why}; leave it out")
        if self.method.reads_latents and self.data.prompts_only:
            raise ValueError(
                f"data.source={self.data.source} gives prompts without latents, and method {self.method.name} learns "
                "from latents; set data.latents to encoder or basis"
            )
        return self

    @model_validator(mode="after")
    def _layout(self) -> PostRecipe:
        given = self.parallel
        if (given.tp, given.cfg, given.vae) != (1, 1, 1):
            raise ValueError(f"parallel ({given}): a training is shared by replicas, ulysses, ring and fsdp")
        if self.loop.accumulate % given.replicas:
            raise ValueError(
                f"parallel: replicas={given.replicas} cannot share the loop.accumulate={self.loop.accumulate} "
                f"micro-batches of an update; set loop.accumulate={_multiple(self.loop.accumulate, given.replicas)}, "
                "and a smaller data.batch for as large an update as before"
            )
        return self

    def optimizer_of(self, role: str) -> OptimizerSection:
        """The optimizer of a role, its schedule as long as the loop."""
        section = self.models[role].optimizer or self.optimizer
        return section if section.steps else section.model_copy(update={"steps": self.loop.steps})


def _article(noun: str) -> str:
    return noun if noun == "checkpointing" else f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _multiple(count: int, of: int) -> int:
    """The next multiple."""
    return -(-count // of) * of


@dataclass(frozen=True, slots=True)
class Command:
    """What was asked for: for cards."""

    path: str
    overrides: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(["kinetoscope train", self.path, *(f"--set {o}" for o in self.overrides)])


@dataclass(frozen=True, slots=True)
class Made:
    """How a model came about: by `command`, in `steps` steps and `seconds` of wall time."""

    command: Command
    steps: int
    seconds: float


def is_post_recipe(data: Mapping[str, Any]) -> bool:
    """Whether a file's sections are those of post-training."""
    return "method" in data


def load_post_recipe(path: str | Path, overrides: Sequence[str] = ()) -> PostRecipe:
    """A recipe of post-training from a YAML file; its method and its source check their own sections.

    Raises:
        ConfigError: the file is missing or not YAML, a key or value does not fit, or an option has no effect; the
            message names the place.
    """
    data = read_recipe(path, overrides)
    for key, told, find in (("method", "name", method_class), ("data", "source", source_class)):
        section = data.get(key)
        if not isinstance(section, dict) or not isinstance(section.get(told), str):
            raise ConfigError(f"recipe {path}: {key} should be a section with {told}")
        data[key] = validated(find(section[told]).settings_class, section, path, f"{key}.")
    recipe = validated(PostRecipe, data, path)
    check_roles(recipe.method.name, recipe.models)
    return recipe
