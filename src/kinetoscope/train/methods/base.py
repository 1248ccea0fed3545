"""What a way of post-training is, and where its batches come from: two small protocols that the trainer drives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol
from zlib import crc32

import torch
from torch import Tensor

from kinetoscope.diffusion.noise import NoiseSource, generator_for
from kinetoscope.train.recipe import Section
from kinetoscope.train.roles import ModelBase, TrainBatch


class MethodSettings(Section):
    """Base of the settings of methods.

    Attributes:
        name: of the method (`train.methods.METHODS`).
    """

    name: str

    @property
    def reads_latents(self) -> bool:
        """Return whether the method learns from the latents of the data, which zeros cannot stand for."""
        return True

    def unread_options(self) -> dict[str, str]:
        """Return the options of roles that have no effect under these settings: "role.option" -> the reason.

        A recipe that sets one of them is refused by name when it is read.
        """
        return {}

    def _refuse_unread(self, **needed: str) -> None:
        """Refuse settings that other settings leave without effect: name -> the setting that it needs."""
        for name, setting in needed.items():
            value: Any = getattr(self, name)
            if value != type(self).model_fields[name].get_default(call_default_factory=True):
                raise ValueError(f"{name}={value} has no effect without {setting}; leave it out")


def pace_of(step: int, role: str) -> torch.Generator:
    """For what decides how many forwards a loss takes: the same for all micro-batches of an update.

    Devices that take different micro-batches would wait for the one with the most forwards, and where they share
    weights, which they gather for each, for ever.
    """
    return generator_for(NoiseSource([step]).fork(crc32(role.encode())).seeds[0])


class Method(Protocol):
    """One way of post-training, made by `Method(roles, settings)`.

    All randomness comes from the generators given, all phases from `step`: resume needs no state of the method. How
    many forwards there are is a matter of the step, not of the sample (`pace_of`). What a method keeps from call to
    call (caches of keys and values) must not change what it computes.

    Attributes:
        settings_class: of the recipe's `method` section.
        needs: names of the roles it cannot do without. A class may also have `optional`, names of roles that a recipe
            may have or not; a recipe with any other role is refused.
        roles: "student" (what is exported), "teacher", "critic".
    """

    settings_class: ClassVar[type[MethodSettings]]
    needs: ClassVar[tuple[str, ...]]
    roles: Mapping[str, ModelBase]

    def __init__(self, roles: Mapping[str, ModelBase], settings: Any) -> None: ...

    def updates(self, step: int) -> Sequence[str]:
        """Names of the trainable roles that are updated in this step, in order."""
        ...

    def losses(self, role: str, batch: TrainBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Scalar terms by name; `total` is minimised by `role`'s optimizer.

        Gradients may only reach parameters of `role`: those of others stay out by `torch.no_grad` or `detach`.

        Args:
            batch: the same for all roles of a step and micro-batch.
            generator: on the CPU, its own for each step, micro-batch and role.
        """
        ...


class BatchSource(Protocol):
    """Where batches come from. The position in the data is the step: nothing is stored and nothing can be lost.

    A source may also have `inputs()`, which returns digests of what it reads by name ("data rows"): a resume on other
    data is then refused (`train.run_inputs`).
    """

    def batch(self, step: int, generator: torch.Generator) -> TrainBatch:
        """Batch number `step`, a function of it, of `generator` (seeded by the recipe's seed and `step`) and of the
        source's settings alone. Latents are float32 and normalised as the transformer reads them."""
        ...
