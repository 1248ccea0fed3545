"""Teacher forcing: every block is denoised after the true past.

The sequence is doubled, [clean | noisy]: noisy blocks see themselves and the clean blocks before them, so that one
forward trains all blocks of a video as sampling with a cache of clean keys and values would meet them, were its past
without errors. Against those, the past can be what the student makes of it (resampling forcing, arXiv 2512.15702);
self-forcing is a training of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from kinetoscope.core.errors import ConfigError
from kinetoscope.diffusion.noise import randn
from kinetoscope.train.methods.base import MethodSettings
from kinetoscope.train.methods.diffusion_forcing import DiffusionForcing, DiffusionForcingSettings
from kinetoscope.train.roles import CausalModelBase, ModelBase, TrainBatch

RESAMPLED = "resampled"
"""Tag of the memory of a past that the student makes."""


class TeacherForcingSettings(DiffusionForcingSettings):
    """Settings of `TeacherForcing`; those of `DiffusionForcingSettings`, and:

    Attributes:
        context_noise: timestep in [0, 1000) to which the past is noised, and at which it is shown.
        jitter: largest deviation of noise in the past that the student is not told of; each sample draws its own. What
            it makes itself will never be exact, so it should not take its past to be.
        resample: highest noise level in [0, 1] from which the student makes its past itself, in one step, block after
            block; each sample draws its own. What comes next is still the data's. 0: the past is the data's.
        resample_passes: how it is made: 0: block after block, exactly. Else all blocks at once, so many times, each
            time after what the last time made (the first time after the data): faster, and exact for as many blocks.
    """

    name: str = "teacher_forcing"
    context_noise: int = Field(default=0, ge=0, lt=1000)
    jitter: float = Field(default=0.0, ge=0)
    resample: float = Field(default=0.0, ge=0, le=1)
    resample_passes: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _passes(self) -> Self:
        if self.resample_passes and not self.resample:
            raise ValueError("resample_passes says how the student makes its past, and resample=0 that it makes none")
        return self


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
        self.causal, self.teaching = self.student, settings
        self.level = settings.context_noise / 1000

    def past(self, batch: TrainBatch, generator: torch.Generator) -> dict[str, Any]:
        """The clean video, for the blocks after each."""
        x0, jitter = batch.latents, self.teaching.jitter
        if self.teaching.resample:
            x0 = self.resampled(batch, generator)
        if jitter:
            deviation = jitter * torch.rand(len(x0), 1, 1, 1, 1, generator=generator)
            x0 = x0 + (deviation * randn(x0.shape, generator)).to(x0.device)
        if not self.level:
            return {"clean": x0}
        s = x0.new_full((len(x0), x0.shape[2]), self.level)
        noisy = self.student.add_noise(x0, randn(x0.shape, generator).to(x0.device), s)
        return {"clean": noisy, "clean_timestep": self.student.denoiser.convention.timestep(s)}

    @torch.no_grad()
    def resampled(self, batch: TrainBatch, generator: torch.Generator) -> Tensor:
        """The video [B, C, T, H, W] noised, and made again by the student: a block after what it made before it."""
        x0, student = batch.latents, self.causal
        level = self.teaching.resample * torch.rand(len(x0), 1, generator=generator).to(x0.device)
        s = level.expand(-1, x0.shape[2])
        noisy = student.add_noise(x0, randn(x0.shape, generator).to(x0.device), s)
        past = x0
        for _ in range(self.teaching.resample_passes):
            past = student.predict_x0(noisy, s, batch, clean=past)
        if self.teaching.resample_passes:
            return past
        made: list[Tensor] = []
        start = 0
        for size in student.blocks(x0.shape[2]):
            x, s = noisy[:, :, start : start + size], level.expand(-1, size)
            block = student.predict_x0_streaming(x, s, batch, cur_start_frame=start, cache_tag=RESAMPLED)
            assert block is not None
            student.predict_streaming(
                block, torch.zeros_like(s), batch, cur_start_frame=start, cache_tag=RESAMPLED, store_kv=True
            )
            made.append(block)
            start += size
        student.clear_caches(RESAMPLED)
        return torch.cat(made, 2)
