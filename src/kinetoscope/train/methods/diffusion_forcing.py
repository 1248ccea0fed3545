"""Diffusion forcing (arXiv 2407.01392): every chunk of frames at a noise level of its own.

A model that has seen clean and noisy frames side by side can be asked for the future of a past: causal models learn it
under their mask, block by block, and models that see the whole video with chunks of any size (SkyReels-V2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kinetoscope.core.errors import ConfigError
from kinetoscope.diffusion.noise import randn
from kinetoscope.train.methods.base import MethodSettings
from kinetoscope.train.methods.finetune import Finetune, FinetuneSettings, snr_weight
from kinetoscope.train.roles import CausalModelBase, ModelBase, TrainBatch


class DiffusionForcingSettings(FinetuneSettings):
    """Settings of `DiffusionForcing`; those of `FinetuneSettings`, and:

    Attributes:
        chunk: latent frames of one level; None: the student's blocks, or one frame where it has none.
        weighting: of squared errors by their level; "bell": exp(-2 (s - 1/2)^2) less its value at the ends, over its
            mean in [0, 1], so that the middle counts most.
    """

    name: str = "diffusion_forcing"
    chunk: int | None = Field(default=None, gt=0)
    weighting: Literal["none", "bell"] = "none"


class DiffusionForcing(Finetune):
    """Squared error of the student's prediction, at levels drawn for each chunk.

    Args:
        roles: "student".
        settings: see `DiffusionForcingSettings`.

    Raises:
        ConfigError: chunks of another size than a causal student's blocks; and see `Finetune`.
    """

    settings_class: ClassVar[type[MethodSettings]] = DiffusionForcingSettings

    def __init__(self, roles: Mapping[str, ModelBase], settings: DiffusionForcingSettings) -> None:
        super().__init__(roles, settings)
        self.forcing = settings
        if settings.chunk is not None and isinstance(self.student, CausalModelBase):
            raise ConfigError(f"method.chunk={settings.chunk}: the chunks of a causal student are its blocks")

    def losses(self, role: str, batch: TrainBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The error over a batch."""
        student, x0 = self.student, batch.latents
        chunks = self.chunks(x0.shape[2])
        drawn = self.levels(batch.rows * len(chunks), generator).view(batch.rows, -1)
        s = torch.repeat_interleave(drawn, torch.tensor(chunks), dim=1).to(x0.device)  # [B, T]
        noise = randn(x0.shape, generator).to(x0.device)
        batch = self.drop_captions(batch, generator)
        predicted = student.predict(student.add_noise(x0, noise, s), s, batch, **self.past(batch, generator))
        error = (predicted - student.denoiser.target(x0, noise, s)).square().mean((1, 3, 4))  # [B, T]
        return {"total": (error * self.weight(s)).mean()}

    def chunks(self, frames: int) -> Sequence[int]:
        """Sizes of what shares a level, in latent frames; the last one may be smaller."""
        if isinstance(self.student, CausalModelBase):
            return self.student.blocks(frames)
        size = self.forcing.chunk or 1
        return [min(size, frames - start) for start in range(0, frames, size)]

    def weight(self, s: Tensor) -> Tensor:
        """What the error at a level counts."""
        weight = torch.ones_like(s)
        if self.forcing.weighting == "bell":
            weight = bell(s) / _BELL_MEAN
        if self.forcing.min_snr is not None:
            weight = weight * snr_weight(self.student.convention, s, self.forcing.min_snr)
        return weight

    def past(self, batch: TrainBatch, generator: torch.Generator) -> dict[str, Any]:
        """Further arguments of the prediction: nothing, the past is what the student is shown."""
        return {}


def bell(s: Tensor) -> Tensor:
    """exp(-2 (s - 1/2)^2), moved to 0 at 0 and 1."""
    return torch.exp(-2 * (s - 0.5) ** 2) - torch.exp(torch.tensor(-0.5))


_BELL_MEAN = float(bell((torch.arange(1000) + 0.5) / 1000).mean())
