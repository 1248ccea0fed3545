"""Consistency distillation (arXiv 2303.01469, with guidance as in arXiv 2310.04378): every point of a teacher's
trajectory leads to the same clean video.

Two neighbours on a trajectory are a noised video and where one step of the teacher's ODE takes it. The student's clean
video from the noisier one shall be the one it makes, without gradient, from the other; at level 0 a video is its own,
and from there on agreement spreads to ever stronger noise. The student is then sampled as few-step students are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kinetoscope.core.errors import ConfigError
from kinetoscope.diffusion.convention import shift_sigma
from kinetoscope.diffusion.noise import randn
from kinetoscope.train.methods.base import MethodSettings
from kinetoscope.train.roles import ModelBase, TrainBatch


class ConsistencySettings(MethodSettings):
    """Settings of consistency distillation.

    Attributes:
        intervals: steps of the teacher's ODE from noise to videos; neighbours are one apart.
        guidance: of the teacher (u + w (c - u)); 1: none.
        huber: c of the pseudo-Huber distance sqrt(d^2 + c^2) - c between clean videos, d their distance over all
            elements (arXiv 2310.14189, section 3.3), which single videos that disagree do not rule; 0: squared error.
    """

    name: str = "consistency"
    intervals: int = Field(48, gt=1)
    guidance: float = Field(3.0, ge=1)
    huber: float = Field(0.0, ge=0)

    def unread_options(self) -> dict[str, str]:
        """Return the options of branches and noise levels that no loss reads."""
        found = {
            "student.uncond": "consistency predicts the conditional branch of the student alone",
            "teacher.shift": "noise levels are those of models.student.shift",
        }
        return found if self.guidance > 1 else {**found, "teacher.uncond": "method.guidance=1 needs one branch"}


class Consistency:
    """Consistency distillation on videos of the data.

    What the noisier neighbour is drawn to is the student itself as it is now, not an average of what it was: the
    average only slows it (arXiv 2310.14189, section 3.2), and there is no further state to keep.

    Args:
        roles: "student", trainable, which begins as the teacher, and "teacher".
        settings: see `ConsistencySettings`.

    Raises:
        ConfigError: a role is no flow model, whose clean video at level 0 is what it is given.
    """

    settings_class: ClassVar[type[MethodSettings]] = ConsistencySettings
    needs: ClassVar[tuple[str, ...]] = ("student", "teacher")

    def __init__(self, roles: Mapping[str, ModelBase], settings: ConsistencySettings) -> None:
        self.roles, self.settings = roles, settings
        self.student, self.teacher = (roles[name] for name in self.needs)
        for name in self.needs:
            if (predicts := roles[name].convention.prediction) != "flow":
                raise ConfigError(f"consistency distillation is for flow models; models.{name} predicts {predicts!r}")
        if settings.guidance > 1:
            self.teacher.need_unconditional(f"method.guidance={settings.guidance:g}", "1")
        self.levels = shift_sigma(torch.linspace(1.0, 0.0, settings.intervals + 1), self.student.shift)

    def updates(self, step: int) -> Sequence[str]:
        """The student."""
        return ("student",)

    def losses(self, role: str, batch: TrainBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """How far apart the clean videos of two neighbours are."""
        index = torch.randint(self.settings.intervals, (batch.rows,), generator=generator)
        noise = randn(batch.latents.shape, generator).to(batch.latents.device)
        high, low = (self.levels[i].to(batch.latents.device) for i in (index, index + 1))
        x = self.student.add_noise(batch.latents, noise, high)
        with torch.no_grad():
            target = self.student.predict_x0(self.ode_step(x, high, low, batch), low, batch)
        return {"total": self.distance(self.student.predict_x0(x, high, batch), target)}

    def ode_step(self, x: Tensor, high: Tensor, low: Tensor, batch: TrainBatch) -> Tensor:
        """One Euler step of the guided teacher from levels `high` [B] to `low` [B]."""
        guidance = None if self.settings.guidance == 1 else self.settings.guidance
        x0 = self.teacher.predict_x0(x, high, batch, guidance=guidance)
        share = (low / high).view(-1, *[1] * (x.ndim - 1))
        return x0 + share * (x - x0)

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Mean over samples of the distance that the settings name, over the number of elements."""
        squares = (a - b).square().flatten(1)
        if self.settings.huber == 0:
            return squares.mean()
        c = self.settings.huber
        return ((squares.sum(1) + c * c).sqrt() - c).mean() / squares.shape[1]
