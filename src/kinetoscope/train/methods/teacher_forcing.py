"""Teacher forcing: every block is denoised after the true past.

The sequence is doubled, [clean | noisy]: noisy blocks see themselves and the clean blocks before them, so that one
forward trains all blocks of a video as sampling with a cache of clean keys and values would meet them, were its past
without errors. Self-forcing is for those.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kinetoscope.core.errors import ConfigError
from kinetoscope.diffusion.noise import randn
from kinetoscope.train.methods.base import MethodSettings
from kinetoscope.train.methods.diffusion_forcing import DiffusionForcing, DiffusionForcingSettings
from kinetoscope.train.roles import CausalModelBase, ModelBase


class TeacherForcingSettings(DiffusionForcingSettings):
    """Settings of `TeacherForcing`; those of `DiffusionForcingSettings`, and:

    Attributes:
        context_noise: timestep in [0, 1000) to which the past is noised, and at which it is shown.
        jitter: largest deviation of noise in the past that the student is not told of; each sample draws its own. What
            it makes itself will never be exact, so it should not take its past to be.
    """

    name: str = "teacher_forcing"
    context_noise: int = Field(default=0, ge=0, lt=1000)
    jitter: float = Field(default=0.0, ge=0)


class TeacherForcing(DiffusionForcing):
    """Squared error of a causal student's prediction after the true past, at levels drawn for each block.

    Raises:
        ConfigError: the student is not causal.
    """

    settings_class: ClassVar[type[MethodSettings]] = TeacherForcingSettings

    def __init__(self, roles: Mapping[str, ModelBase], settings: TeacherForcingSettings) -> None:
        super().__init__(roles, settings)
        if not isinstance(self.student, CausalModelBase):
            raise ConfigError("teacher_forcing is of causal students; this one sees the whole video at once")
        self.level, self.jitter = settings.context_noise / 1000, settings.jitter

    def past(self, x0: Tensor, generator: torch.Generator) -> dict[str, Any]:
        """The clean video, for the blocks after each."""
        if self.jitter:
            deviation = self.jitter * torch.rand(len(x0), 1, 1, 1, 1, generator=generator)
            x0 = x0 + (deviation * randn(x0.shape, generator)).to(x0.device)
        if not self.level:
            return {"clean": x0}
        s = x0.new_full((len(x0), x0.shape[2]), self.level)
        noisy = self.student.add_noise(x0, randn(x0.shape, generator).to(x0.device), s)
        return {"clean": noisy, "clean_timestep": self.student.denoiser.convention.timestep(s)}
