"""Distribution matching distillation (DMD2, arXiv 2405.14867): a student that needs a few steps and no guidance.

The student makes a video in the few steps that it will be sampled with. Noised again, that video is shown to two score
models: the teacher under guidance, which knows what videos should be, and the critic, which is trained alongside on
what the student makes. Where they differ is where the student's distribution is wrong: the difference of their
estimates of the clean video is the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kinetoscope.core.errors import ConfigError
from kinetoscope.diffusion.few_step import TRAIN_STEPS, FewStepSchedule
from kinetoscope.diffusion.noise import randn
from kinetoscope.train.methods.base import MethodSettings, pace_of
from kinetoscope.train.roles import ModelBase, TrainBatch


class DMD2Settings(MethodSettings):
    """Settings of DMD2.

    Attributes:
        steps: the student's timesteps, decreasing in [1, 1000], as it will be sampled with (`dmd_denoising_steps`).
        warp: `steps` count along the schedule shifted by the student's shift (`warp_denoising_step`).
        rollout: "simulate": the student's own steps from noise to a random one of them, which prompts are enough for;
            "data_latent": one step from noised videos of the data.
        guidance: of the teacher (u + w (c - u)); 1: none.
        student_every: the critic is updated in every step, the student in each one of so many.
        student_start: steps before the student's first update, in which the critic learns what it makes.
        levels: lowest and highest noise level at which the scores are compared.
    """

    name: str = "dmd2"
    steps: tuple[int, ...] = (1000, 750, 500, 250)
    warp: bool = True
    rollout: Literal["simulate", "data_latent"] = "simulate"
    guidance: float = Field(3.5, ge=1)
    student_every: int = Field(5, gt=0)
    student_start: int = Field(0, ge=0)
    levels: tuple[float, float] = (0.02, 0.98)

    @model_validator(mode="after")
    def _levels(self) -> DMD2Settings:
        if not 0 < self.levels[0] < self.levels[1] <= 1:
            raise ValueError(f"levels must rise within (0, 1], got {self.levels}")
        return self

    @property
    def reads_latents(self) -> bool:
        """Return whether rollouts begin with videos of the data."""
        return self.rollout == "data_latent"

    def unread_options(self) -> dict[str, str]:
        """Return the options of branches and noise levels that no loss reads."""
        found = {
            f"{role}.uncond": f"the {role} predicts the conditional branch alone" for role in ("student", "critic")
        }
        found["critic.shift"] = "noise levels of the scores are those of models.teacher.shift"
        return found if self.guidance > 1 else {**found, "teacher.uncond": "method.guidance=1 needs one branch"}


class DMD2:
    """DMD2 over any family of flow models.

    Args:
        roles: "student" and "critic", trainable, and "teacher"; all begin as the teacher as a rule.
        settings: see `DMD2Settings`.

    Raises:
        ConfigError: a role is no flow model.
        InputError: see `FewStepSchedule.make`.
    """

    settings_class: ClassVar[type[MethodSettings]] = DMD2Settings
    needs: ClassVar[tuple[str, ...]] = ("student", "teacher", "critic")

    def __init__(self, roles: Mapping[str, ModelBase], settings: DMD2Settings) -> None:
        self.roles, self.settings = roles, settings
        self.student, self.teacher, self.critic = (roles[name] for name in self.needs)
        for name in self.needs:
            if (predicts := roles[name].convention.prediction) != "flow":
                raise ConfigError(
                    f"dmd2 samples its student, and noises what it makes, as flow models do; models.{name} predicts "
                    f"{predicts!r}"
                )
        if settings.guidance > 1:
            self.teacher.need_unconditional(f"method.guidance={settings.guidance:g}", "1")
        self.schedule = FewStepSchedule.make(settings.steps, self.student.shift, warp=settings.warp)

    def updates(self, step: int) -> Sequence[str]:
        """The critic, and after it the student when it is its turn."""
        late = step - self.settings.student_start
        turn = late >= 0 and late % self.settings.student_every == 0
        return ("critic", "student") if turn else ("critic",)

    def losses(self, role: str, batch: TrainBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Of the critic: how well it denoises what the student makes. Of the student: `dmd_loss` of what it makes."""
        if role == "critic":
            with torch.no_grad():
                x0 = self.rollout(batch, generator, pace_of(step, role))
            return {"total": self.critic_loss(x0, batch, generator)}
        x0 = self.rollout(batch, generator, pace_of(step, role))
        total, gradient = self.dmd_loss(x0, batch, generator)
        return {"total": total, "gradient": gradient}

    # -- what the student makes ---------------------------------------------------------------------------------------

    def rollout(self, batch: TrainBatch, generator: torch.Generator, pace: torch.Generator) -> Tensor:
        """Videos by the student [B, C, T, H, W], differentiable in the last of the steps they took.

        The steps are those of sampling, up to one drawn at random from `pace`, whose estimate of the clean video is the
        video.
        """
        exit_step = self.exit_step(pace)
        x = self.draw(batch, generator)
        if self.settings.rollout == "data_latent":
            sigma = self.schedule.sigmas[exit_step]
            return self.jump(exit_step, (1 - sigma) * batch.latents + sigma * x, batch)
        with torch.no_grad():
            for index in range(exit_step):
                x0 = self.jump(index, x, batch)
                x = self.schedule.renoise(index, x0, lambda: self.draw(batch, generator))
        return self.jump(exit_step, x, batch)

    def exit_step(self, generator: torch.Generator) -> int:
        """The step whose estimate is the video: any, as likely as another."""
        return int(torch.randint(len(self.schedule), (), generator=generator))

    def jump(self, index: int, x: Tensor, batch: TrainBatch) -> Tensor:
        """The student's clean video from `x` at step `index`, as in sampling."""
        time = x.new_full((batch.rows,), self.schedule.times[index]) / TRAIN_STEPS
        return self.schedule.predict(index, x, self.student.predict(x, time, batch))

    # -- what it learns from ------------------------------------------------------------------------------------------

    def dmd_loss(self, x0: Tensor, batch: TrainBatch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A loss whose gradient in `x0` is that of DMD over the number of elements, and the gradient's mean size."""
        level = self.levels(batch.rows, generator).to(x0.device)
        with torch.no_grad():
            noisy = self.teacher.add_noise(x0, self.draw(batch, generator), level)
            fake = self.critic.predict_x0(noisy, level, batch)
            guidance = None if self.settings.guidance == 1 else self.settings.guidance
            real = self.teacher.predict_x0(noisy, level, batch, guidance=guidance)
            gradient = dmd_gradient(x0, fake, real)
        return 0.5 * (x0 - (x0 - gradient).detach()).square().mean(), gradient.abs().mean()

    def critic_loss(self, x0: Tensor, batch: TrainBatch, generator: torch.Generator) -> Tensor:
        """Mean squared error of the critic's prediction on the student's videos, noised as they are scored."""
        level = self.levels(batch.rows, generator).to(x0.device)
        noise = self.draw(batch, generator)
        predicted = self.critic.predict(self.critic.add_noise(x0, noise, level), level, batch)
        return (predicted - self.critic.denoiser.target(x0, noise, level)).square().mean()

    def levels(self, rows: int, generator: torch.Generator) -> Tensor:
        """Noise levels [B]: uniform, shifted as the teacher's, within the settings' bounds."""
        return self.teacher.shift_and_clamp_timestep(torch.rand(rows, generator=generator), *self.settings.levels)

    def draw(self, batch: TrainBatch, generator: torch.Generator) -> Tensor:
        """Standard normal noise of the latents' shape."""
        return randn(batch.latents.shape, generator).to(batch.latents.device)


def dmd_gradient(x0: Tensor, fake: Tensor, real: Tensor) -> Tensor:
    """The direction in which the student's videos are too likely: (fake - real) / mean |x0 - real|, mean a sample.

    The difference of the two estimates of the clean video is the difference of scores times s^2 / alpha; the
    denominator makes noise levels count alike (arXiv 2311.18828, equation 8).

    Args:
        x0: what the student made [B, ...].
        fake: the critic's estimate from noised `x0`.
        real: the teacher's. A sample that it returns as it was has no direction.
    """
    size = (x0 - real).abs().flatten(1).mean(1).view(-1, *[1] * (x0.ndim - 1))
    return torch.nan_to_num((fake - real) / size, posinf=0.0, neginf=0.0)
