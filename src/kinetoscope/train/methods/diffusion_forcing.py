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
from kinetoscope.diffusion.convention import shift_sigma
from kinetoscope.diffusion.noise import randn
from kinetoscope.train.methods.base import MethodSettings
from kinetoscope.train.roles import CausalModelBase, ModelBase, Text, TrainBatch


class DiffusionForcingSettings(MethodSettings):
    """Settings of `DiffusionForcing`.

    Attributes:
        chunk: latent frames of one level; None: the student's blocks, or one frame where it has none.
        levels: distribution of noise levels before the student's shift.
        logit_mean, logit_std: of "logit_normal".
        weighting: of squared errors by the shifted level; "bell": exp(-2 (s - 1/2)^2) less its value at the ends, over
            its mean in [0, 1], so that the middle counts most.
        dropout: fraction of samples that read what the unconditional branch reads, for guidance.
    """

    name: str = "diffusion_forcing"
    chunk: int | None = Field(default=None, gt=0)
    levels: Literal["uniform", "logit_normal"] = "uniform"
    logit_mean: float = 0.0
    logit_std: float = Field(default=1.0, gt=0)
    weighting: Literal["none", "bell"] = "none"
    dropout: float = Field(default=0.1, ge=0, lt=1)


class DiffusionForcing:
    """Squared error of the student's prediction, at levels drawn for each chunk.

    Args:
        roles: "student".
        settings: see `DiffusionForcingSettings`.

    Raises:
        ConfigError: chunks of another size than a causal student's blocks.
    """

    settings_class: ClassVar[type[MethodSettings]] = DiffusionForcingSettings
    needs: ClassVar[tuple[str, ...]] = ("student",)

    def __init__(self, roles: Mapping[str, ModelBase], settings: DiffusionForcingSettings) -> None:
        self.roles, self.settings = roles, settings
        if settings.chunk is not None and isinstance(roles["student"], CausalModelBase):
            raise ConfigError(
                f"method.chunk={settings.chunk}: the chunks of a causal student are its blocks; leave out"
            )

    def updates(self, step: int) -> Sequence[str]:
        """The student, in every step."""
        return ("student",)

    def losses(self, role: str, batch: TrainBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The error over a batch."""
        student, x0 = self.roles[role], batch.latents
        batch = drop_text(student, batch, self.settings.dropout, generator)
        chunks = self.chunks(student, x0.shape[2])
        level = self.draw_levels(batch.rows, len(chunks), student.shift, generator)
        s = torch.repeat_interleave(level, torch.tensor(chunks), dim=1).to(x0.device)  # [B, T]
        noise = randn(x0.shape, generator).to(x0.device)
        predicted = student.predict(student.add_noise(x0, noise, s), s, batch, **self.past(student, x0, generator))
        error = (predicted - student.denoiser.target(x0, noise, s)).square().mean((1, 3, 4))  # [B, T]
        return {"total": (error * self.weight(s)).mean()}

    def chunks(self, student: ModelBase, frames: int) -> Sequence[int]:
        """Sizes of what shares a level, in latent frames; the last one may be smaller."""
        if isinstance(student, CausalModelBase):
            return student.blocks(frames)
        size = self.settings.chunk or 1
        return [min(size, frames - start) for start in range(0, frames, size)]

    def draw_levels(self, rows: int, chunks: int, shift: float, generator: torch.Generator) -> Tensor:
        """Noise levels [B, chunks], independent."""
        settings = self.settings
        if settings.levels == "uniform":
            u = torch.rand(rows, chunks, generator=generator)
        else:
            u = torch.sigmoid(settings.logit_mean + settings.logit_std * randn((rows, chunks), generator))
        return shift_sigma(u, shift)

    def weight(self, s: Tensor) -> Tensor:
        """What the error at a level counts."""
        return bell(s) / _BELL_MEAN if self.settings.weighting == "bell" else torch.ones_like(s)

    def past(self, student: ModelBase, x0: Tensor, generator: torch.Generator) -> dict[str, Any]:
        """Further arguments of the prediction: nothing, the past is what the student is shown."""
        return {}


def bell(s: Tensor) -> Tensor:
    """exp(-2 (s - 1/2)^2), moved to 0 at 0 and 1."""
    return torch.exp(-2 * (s - 0.5) ** 2) - torch.exp(torch.tensor(-0.5))


_BELL_MEAN = float(bell((torch.arange(1000) + 0.5) / 1000).mean())


def drop_text(student: ModelBase, batch: TrainBatch, fraction: float, generator: torch.Generator) -> TrainBatch:
    """A batch some of whose samples read what the unconditional branch reads (arXiv 2207.12598)."""
    dropped = torch.rand(batch.rows, generator=generator) < fraction
    if not dropped.any():
        return batch
    empty = student.text_of(batch, False)
    width = max(batch.text.states.shape[1], empty.states.shape[1])
    states = [torch.nn.functional.pad(t.states, (0, 0, 0, width - t.states.shape[1])) for t in (empty, batch.text)]
    chosen = torch.where(dropped.view(-1, 1, 1).to(states[0].device), *states)
    return TrainBatch(batch.latents, Text(chosen, torch.where(dropped, empty.lengths, batch.text.lengths)))
