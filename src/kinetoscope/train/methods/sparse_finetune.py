"""Fine-tuning to sparse attention: what is left out grows step by step, so that the model can follow (VSA, arXiv
2505.13389, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kinetoscope.core.errors import ConfigError
from kinetoscope.train.methods.base import MethodSettings
from kinetoscope.train.methods.finetune import Finetune, FinetuneSettings
from kinetoscope.train.roles import CausalModelBase, ModelBase, TrainBatch


class SparseFinetuneSettings(FinetuneSettings):
    """Settings of `SparseFinetune`, beside those of fine-tuning.

    Attributes:
        sparsity: share of the tiles of keys that are left out in the end.
        tile: sizes of a tile in tokens: frames, rows, columns.
        start: share left out in the first steps; 0: attention is dense there.
        rise, every: the share grows by `rise` after every so many steps.
    """

    name: str = "sparse_finetune"
    sparsity: float = Field(default=0.8, gt=0, lt=1)
    tile: tuple[int, int, int] = (4, 4, 4)
    start: float = Field(default=0.0, ge=0, lt=1)
    rise: float = Field(default=0.03, gt=0)
    every: int = Field(default=50, gt=0)

    @model_validator(mode="after")
    def _rises(self) -> SparseFinetuneSettings:
        if self.start > self.sparsity:
            raise ValueError(f"start={self.start} is above sparsity={self.sparsity}, which the share rises to")
        if min(self.tile) < 1:
            raise ValueError(f"tile={self.tile} should be three sizes above 0")
        return self

    def unread_options(self) -> dict[str, str]:
        """Return the student's kind of attention as well, which the schedule of sparsity sets."""
        return {**super().unread_options(), "student.attention": "sparse_finetune sets it (method.sparsity, tile)"}


class SparseFinetune(Finetune):
    """Fine-tuning under video sparse attention whose sparsity is a function of the step.

    Raises:
        ConfigError: a causal student, or what `Finetune` refuses.
    """

    settings_class: ClassVar[type[MethodSettings]] = SparseFinetuneSettings

    def __init__(self, roles: Mapping[str, ModelBase], settings: SparseFinetuneSettings) -> None:
        super().__init__(roles, settings)
        if isinstance(self.student, CausalModelBase):
            raise ConfigError("sparse_finetune is for models that see the whole video; a causal one attends densely")
        if self.student.shard is not None and self.student.shard.ring.size > 1:
            raise ConfigError("sparse_finetune needs all tokens in one place; set parallel.ulysses in place of ring")
        self.ramp = settings
        self.student.attend_with(self.attention(10**9))  # refuses here what the last steps could not attend with
        self._now = ""

    def losses(self, role: str, batch: TrainBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Mean squared error of the prediction with this step's attention."""
        if (wanted := self.attention(step)) != self._now:
            self.student.attend_with(wanted)
            self._now = wanted
        return super().losses(role, batch, step, generator)

    def attention(self, step: int) -> str:
        """The kind of attention of a step, as `ModelBase.attend_with` reads it."""
        sparsity = min(self.ramp.start + self.ramp.rise * (step // self.ramp.every), self.ramp.sparsity)
        if sparsity == 0:
            return "dense"
        return f"vsa:sparsity={sparsity:.6g},tile={','.join(map(str, self.ramp.tile))}"
