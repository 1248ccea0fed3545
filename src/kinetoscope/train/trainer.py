"""The trainer of post-training: roles, a method and batches in; steps of whichever roles the method updates out."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from kinetoscope.core.errors import ConfigError
from kinetoscope.diffusion.noise import NoiseSource, generator_for
from kinetoscope.train.causalize import CausalSection, make_causal
from kinetoscope.train.data import SourceContext, make_source
from kinetoscope.train.loop import Learner
from kinetoscope.train.lora import LoraLayers
from kinetoscope.train.methods import BatchSource, Method, make_method
from kinetoscope.train.plugins import Opened
from kinetoscope.train.post import STUDENT, PostRecipe
from kinetoscope.train.roles import CausalModelBase, ModelBase, TrainBatch
from kinetoscope.train.run_inputs import FileDigests, RunInputs, environment
from kinetoscope.train.team import Team, whole


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


def open_roles(recipe: PostRecipe, team: Team) -> dict[str, Role]:
    """The models of a recipe, each with its own weights, or this process's part of them.

    What the unconditional branches read is encoded here, once for every role and on every rank.

    Raises:
        ModelLoadError: there is no such model, or weights do not fit.
        ConfigError: a family that cannot be trained, or not by this layout, or a LoRA that fits no layer.
    """
    roles: dict[str, Role] = {}
    for number, (name, section) in enumerate(recipe.models.items()):
        start = section.init_from
        if section.causal is not None:
            start = str(_made_causal(start, section.causal, Path(recipe.output) / "causal" / name, team))
        opened = Opened(start, section.transformer, str(team.device))
        model = opened.role(
            trainable=section.trainable, shift=section.shift, uncond=section.uncond, attention=section.attention,
            checkpointing=section.checkpointing, compile=section.compile, shard=team.shard,
        )  # fmt: skip
        if team.shard is not None and team.shard.ring.size > 1 and isinstance(model, CausalModelBase):
            raise ConfigError(f"models.{name} is causal: its memory is of whole frames; use ulysses in place of ring")
        trained = model.transformer if section.trainable else None
        if section.lora is not None:
            generator = generator_for(NoiseSource([recipe.seed]).fork(number, 0, 0, 0).seeds[0])
            trained = LoraLayers(model.transformer, section.lora, generator)
        team.place(model.transformer, opened.class_name)  # before the next is opened: one at a time is here whole
        roles[name] = Role(opened, model, trained)
    student = roles[STUDENT].opened
    encoder = student.encoder()
    for role in roles.values():
        role.model.init_preprocessors(encoder, student.negative_prompt)
    return roles


def _made_causal(start: str, section: CausalSection, folder: Path, team: Team) -> Path:
    """Return the folder of `make_causal`, which the first process calls. Of a run that no start has claimed yet, what a
    failed start has left there is made anew."""

    def make() -> None:
        if not (folder.parents[1] / "recipe.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
        make_causal(start, section, folder)

    team.alone(make)
    return folder


class Trainer:
    """A `loop.Job`.

    In each step the batches of its micro-batches are made once, and then each role that the method updates gathers
    gradients over them, clips them, steps its optimizer and its average. What a step sees is a function of the seed
    and the step's number alone: several processes share out its micro-batches.

    Args:
        team: this process among them.
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
        team: Team | None = None,
        on_count: Callable[[int, int], None] | None = None,
        after_step: Callable[[int, dict[str, float]], None] | None = None,
    ) -> None:
        self.recipe, self.after_step = recipe, after_step
        self.name, self.steps, self.log_every = recipe.name, recipe.loop.steps, recipe.loop.log_every
        self.team = Team(torch.device(recipe.device)) if team is None else team
        self.roles = open_roles(recipe, self.team)
        models = {name: role.model for name, role in self.roles.items()}
        self.method: Method = make_method(recipe.method, models)
        self._context = SourceContext(self.roles[STUDENT].opened, folder, on_count)
        self.learners = {
            name: Learner(f"{recipe.name}, {name}", role.trained, recipe.optimizer_of(name), self.team.clip)
            for name, role in self.roles.items()
            if role.trained is not None
        }
        self._check_updates()
        for model in models.values():
            model.on_train_start()

    @cached_property
    def source(self) -> BatchSource:
        """Where batches come from; opening it may take long."""
        return make_source(self.recipe.data, self._context)

    def prepare(self) -> None:
        """Open the data, so that its mistakes are told before the first step; one process makes what is not there."""

        def make() -> None:
            _ = self.source

        self.team.alone(make)
        make()

    def inputs(self, files: FileDigests, *, data: bool = False) -> RunInputs:
        """Return digests of what is trained from: the transformer of each role, all components of the student, and,
        if `data`, what the source of batches says of itself (`BatchSource.inputs`)."""
        found: dict[str, str] = {}
        for name, role in self.roles.items():
            digests = role.opened.digests(files, whole=name == STUDENT)
            found |= {f"models.{name} {part}": digest for part, digest in digests.items()}
        if data and (of_data := getattr(self.source, "inputs", None)) is not None:
            found |= of_data()
        recipe = self.recipe
        layout = environment(device=self.team.device.type, threads=recipe.threads, parallel=str(recipe.parallel))
        return RunInputs(found, layout, files)

    def step(self, step: int) -> dict[str, float]:
        """Update the roles of this step; values are named "role.term"."""
        values: dict[str, float] = {}
        batches = [(micro, self._batch(step, micro)) for micro in self.team.micro_batches(self.recipe.loop.accumulate)]
        for name in self.method.updates(step):
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

    def student_weights(self) -> dict[str, Tensor]:
        """All weights of the student's transformer, in the first process; none where a LoRA is trained. Every process
        calls it."""
        student = self.roles[STUDENT]
        return {} if student.lora is not None else whole(student.opened.transformer.state_dict(), kept=self.team.leads)

    def _check_updates(self) -> None:
        """Check, over all steps, that the roles that are updated are those that are trainable.

        Raises:
            ConfigError: a role is updated that is not trainable, or is trainable and never updated.
        """
        method, updated = self.recipe.method.name, {n for s in range(self.steps) for n in self.method.updates(s)}
        if frozen := sorted(updated - self.learners.keys()):
            raise ConfigError(f"method {method} updates models.{frozen[0]}; set its trainable: true")
        if idle := sorted(self.learners.keys() - updated):
            raise ConfigError(
                f"models.{idle[0]} is trainable, and method {method} does not update it in any of the "
                f"loop.steps={self.steps} steps; set more loop.steps, an earlier start (method.{idle[0]}_start, where "
                "the method has one), or trainable: false"
            )

    def _update(self, name: str, step: int, batches: list[tuple[int, TrainBatch]]) -> dict[str, float]:
        learner, loop = self.learners[name], self.recipe.loop
        learner.clear()
        values: dict[str, float] = {}
        for micro, batch in batches:
            generator = self._generator(step, micro, crc32(name.encode()))
            with torch.autocast(self.team.device.type, torch.bfloat16, enabled=loop.precision == "bfloat16"):
                terms = self.method.losses(name, batch, step, generator)
            self.roles[name].model.backward(terms["total"], len(batches))
            for term, value in terms.items():
                values[term] = values.get(term, 0.0) + float(value.detach()) / len(batches)
        values = self.team.mean(values)
        return values | {"grad_norm": learner.update(step, values)}

    def _batch(self, step: int, micro: int) -> TrainBatch:
        number = step * self.recipe.loop.accumulate + micro
        return self.source.batch(number, self._generator(step, micro)).to(self.team.device)

    def _generator(self, *key: int) -> torch.Generator:
        return generator_for(NoiseSource([self.recipe.seed]).fork(*key).seeds[0])
