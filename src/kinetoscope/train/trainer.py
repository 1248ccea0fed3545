"""The trainer of post-training: roles, a method and batches in; steps of whichever roles the method updates out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import nn

from kinetoscope.core.errors import ConfigError
from kinetoscope.diffusion.noise import NoiseSource, generator_for
from kinetoscope.train.causalize import make_causal
from kinetoscope.train.checkpoint import load_checkpoint, save_checkpoint
from kinetoscope.train.data import SourceContext, make_source
from kinetoscope.train.loop import Learner
from kinetoscope.train.lora import LoraLayers
from kinetoscope.train.methods import BatchSource, Method, make_method
from kinetoscope.train.plugins import Opened
from kinetoscope.train.post import STUDENT, PostRecipe
from kinetoscope.train.roles import ModelBase, TrainBatch


@dataclass(frozen=True, slots=True)
class Role:
    """A model in a role, opened.

    Attributes:
        opened: the directory it came from; its pipeline samples with the role's own weights.
        model: what methods see.
        trained: what has an optimizer: the transformer, or its LoRA; None: frozen.
    """

    opened: Opened
    model: ModelBase
    trained: nn.Module | None

    @property
    def lora(self) -> LoraLayers | None:
        """The LoRA, if that is what is trained."""
        return self.trained if isinstance(self.trained, LoraLayers) else None


def open_roles(recipe: PostRecipe) -> dict[str, Role]:
    """The models of a recipe, each with its own weights.

    What the unconditional branches read is encoded here, once for every role and on every rank.

    Raises:
        ModelLoadError: there is no such model, or weights do not fit.
        ConfigError: a family that cannot be trained, or a LoRA that fits no layer.
    """
    roles: dict[str, Role] = {}
    for number, (name, section) in enumerate(recipe.models.items()):
        start = section.init_from
        if section.causal is not None:
            start = str(make_causal(start, section.causal, Path(recipe.output) / "causal" / name))
        opened = Opened(start, section.transformer, recipe.device)
        model = opened.role(
            trainable=section.trainable, shift=section.shift, uncond=section.uncond, attention=section.attention,
            checkpointing=section.checkpointing,
        )  # fmt: skip
        trained = model.transformer if section.trainable else None
        if section.lora is not None:
            generator = generator_for(NoiseSource([recipe.seed]).fork(number, 0, 0, 0).seeds[0])
            trained = LoraLayers(model.transformer, section.lora, generator)
        roles[name] = Role(opened, model, trained)
    student = roles[STUDENT].opened
    encoder = student.encoder()
    for role in roles.values():
        role.model.init_preprocessors(encoder, student.negative_prompt)
    return roles


class Trainer:
    """A `loop.Job`.

    In each step the batches of its micro-batches are made once, and then each role that the method updates gathers
    gradients over them, clips them, steps its optimizer and its average. What a step sees is a function of the seed
    and the step's number alone.

    Args:
        on_count: told (done, total) of lengthy preparations of the data.
        after_step: called with (step, values) after each step.

    Raises:
        ConfigError: the recipe's parts do not go together.
    """

    def __init__(
        self,
        recipe: PostRecipe,
        folder: Path,
        *,
        on_count: Callable[[int, int], None] | None = None,
        after_step: Callable[[int, dict[str, float]], None] | None = None,
    ) -> None:
        self.recipe, self.after_step = recipe, after_step
        self.name, self.steps, self.log_every = recipe.name, recipe.loop.steps, recipe.loop.log_every
        self.roles = open_roles(recipe)
        models = {name: role.model for name, role in self.roles.items()}
        self.method: Method = make_method(recipe.method, models)
        self._context = SourceContext(self.roles[STUDENT].opened, folder, on_count)
        self.learners = {
            name: Learner(f"{recipe.name}, {name}", role.trained, recipe.optimizer_of(name))
            for name, role in self.roles.items()
            if role.trained is not None
        }
        self.device = torch.device(recipe.device)
        for model in models.values():
            model.on_train_start()

    @cached_property
    def source(self) -> BatchSource:
        """Where batches come from; opening it may take long."""
        return make_source(self.recipe.data, self._context)

    def prepare(self) -> None:
        """Open the data, so that its mistakes are told before the first step."""
        _ = self.source

    def step(self, step: int) -> dict[str, float]:
        """Update the roles of this step; values are named "role.term"."""
        values: dict[str, float] = {}
        batches = [self._batch(step, micro) for micro in range(self.recipe.loop.accumulate)]
        for name in self.method.updates(step):
            if name not in self.learners:
                raise ConfigError(f"method {self.recipe.method.name} updates models.{name}; set its trainable: true")
            values |= {f"{name}.{k}": v for k, v in self._update(name, step, batches).items()}
        if self.after_step:
            self.after_step(step, values)
        return values

    def state(self) -> dict[str, Any]:
        """Weights, optimizers and averages of the trained roles."""
        return {"roles": {name: learner.state() for name, learner in self.learners.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            ConfigError: it is of other roles.
        """
        if state["roles"].keys() != self.learners.keys():
            raise ConfigError(
                f"the checkpoint trains {', '.join(state['roles'])}; the recipe {', '.join(self.learners)}"
            )
        for name, learner in self.learners.items():
            learner.load(state["roles"][name])

    def _update(self, name: str, step: int, batches: list[TrainBatch]) -> dict[str, float]:
        learner, loop = self.learners[name], self.recipe.loop
        learner.clear()
        values: dict[str, float] = {}
        for micro, batch in enumerate(batches):
            generator = self._generator(step, micro, crc32(name.encode()))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=loop.precision == "bfloat16"):
                terms = self.method.losses(name, batch, step, generator)
            self.roles[name].model.backward(terms["total"], len(batches))
            for term, value in terms.items():
                values[term] = values.get(term, 0.0) + float(value.detach()) / len(batches)
        return values | {"grad_norm": learner.update(step, values)}

    def _batch(self, step: int, micro: int) -> TrainBatch:
        number = step * self.recipe.loop.accumulate + micro
        return self.source.batch(number, self._generator(step, micro)).to(self.device)

    def _generator(self, *key: int) -> torch.Generator:
        return generator_for(NoiseSource([self.recipe.seed]).fork(*key).seeds[0])


@dataclass(frozen=True, slots=True)
class KeptCheckpoints:
    """A `loop.Store`: the newest `keep` checkpoints of a folder, each one file."""

    folder: Path
    keep: int

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the file whole, then remove what is older than the last `keep`, and what a kill left half written."""
        save_checkpoint(self.folder / f"step-{step:08d}.pt", state)
        for old in (*self._files()[: -self.keep], *self.folder.glob("step-*.tmp")):
            old.unlink()

    def load(self) -> dict[str, Any] | None:
        """The newest."""
        files = self._files()
        return load_checkpoint(files[-1]) if files else None

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.pt"))
