"""Fine-tuning: the objective that the model was trained with, on other clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kinetoscope.core.errors import ConfigError
from kinetoscope.diffusion.convention import Convention, shift_sigma
from kinetoscope.diffusion.few_step import FewStepSchedule
from kinetoscope.diffusion.noise import randn
from kinetoscope.train.methods.base import MethodSettings
from kinetoscope.train.roles import ModelBase, TrainBatch


class FinetuneSettings(MethodSettings):
    """Settings of `Finetune`.

    Attributes:
        sampling: how noise levels are drawn, before the role's shift: "logit_normal" and "mode" (arXiv 2403.03206,
            section 3.1), or "uniform"; for EDM, their places (`Convention.level`). "steps": those of a few-step
            schedule alone, each as often as another, for a flow that will be sampled in them.
        logit_mean, logit_std: of logit_normal.
        mode_scale: of mode: above 0 the middle is drawn more often, below 0 the ends.
        steps, warp: of "steps": its timesteps, and whether they count along the schedule shifted by the role's shift
            (`dmd_denoising_steps` and `warp_denoising_step` of sampling).
        caption_dropout: share of samples that read what the unconditional branch does, for guidance.
        min_snr: squared errors of the noise weigh at most this over the signal-to-noise ratio, in terms of the clean
            sample min(snr, gamma) (arXiv 2303.09556); for predictions of noise, of v or of the sample. A flow and EDM
            have a sampling of levels in place of it.
    """

    sampling: Literal["logit_normal", "uniform", "mode", "steps"] = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = Field(default=1.0, gt=0)
    mode_scale: float = Field(default=1.29, ge=-1, le=1.75)
    steps: tuple[int, ...] = ()
    warp: bool = True
    caption_dropout: float = Field(default=0.1, ge=0, lt=1)
    min_snr: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _steps(self) -> FinetuneSettings:
        if (self.sampling == "steps") != bool(self.steps):
            raise ValueError("steps are of sampling: steps, which needs them")
        if self.sampling != "logit_normal":
            self._refuse_unread(logit_mean="sampling=logit_normal", logit_std="sampling=logit_normal")
        if self.sampling != "mode":
            self._refuse_unread(mode_scale="sampling=mode")
        if self.sampling != "steps":
            self._refuse_unread(warp="sampling=steps")
        return self

    def unread_options(self) -> dict[str, str]:
        """Return what the student reads for the unconditional branch, where no caption is dropped."""
        return {} if self.caption_dropout else {"student.uncond": "method.caption_dropout=0 drops no caption"}


class Finetune:
    """The student predicts what its convention says, at random noise levels.

    With a `lora` in the student's section it is LoRA training; with `attention: vsa:...` the student learns to do with
    sparse attention.

    Raises:
        ConfigError: min-SNR for a flow, or for a network inside the scalings of EDM; a few-step schedule for another
            model than a flow.
        InputError: see `FewStepSchedule.make`.
    """

    settings_class: ClassVar[type[MethodSettings]] = FinetuneSettings
    needs: ClassVar[tuple[str, ...]] = ("student",)

    def __init__(self, roles: Mapping[str, ModelBase], settings: FinetuneSettings) -> None:
        self.roles, self.settings = roles, settings
        self.student = roles["student"]
        others = {"flow": "a flow", "edm": "in the scalings of EDM"}
        if settings.min_snr is not None and (how := others.get(self.student.convention.prediction)):
            raise ConfigError(
                f"method.min_snr is for predictions of noise, of v or of the sample; this model predicts {how}, where "
                "sampling of levels does its work: leave min_snr out"
            )
        self.few: tuple[float, ...] = ()
        if settings.steps:
            if (predicts := self.student.convention.prediction) != "flow":
                raise ConfigError(f"method.sampling=steps is for flow models; this one predicts {predicts!r}")
            self.few = FewStepSchedule.make(settings.steps, self.student.shift, warp=settings.warp).sigmas
        if settings.caption_dropout:
            self.student.need_unconditional(f"method.caption_dropout={settings.caption_dropout:g}", "0")

    def updates(self, step: int) -> Sequence[str]:
        """The student, always."""
        return ("student",)

    def losses(self, role: str, batch: TrainBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Mean squared error of the prediction."""
        s = self.levels(batch.rows, generator).to(batch.latents.device)
        noise = randn(batch.latents.shape, generator).to(batch.latents.device)
        batch = self.drop_captions(batch, generator)
        x = self.student.add_noise(batch.latents, noise, s)
        target = self.student.denoiser.target(batch.latents, noise, s)
        error = (self.student.predict(x, s, batch) - target).square().flatten(1).mean(1)  # [B]
        if self.settings.min_snr is not None:
            error = error * snr_weight(self.student.convention, s, self.settings.min_snr)
        return {"total": error.mean()}

    def levels(self, rows: int, generator: torch.Generator) -> Tensor:
        """Noise levels [rows], as the student's convention has them."""
        settings = self.settings
        if self.few:
            return torch.tensor(self.few)[torch.randint(len(self.few), (rows,), generator=generator)]
        if settings.sampling == "logit_normal":
            u = torch.sigmoid(settings.logit_mean + settings.logit_std * randn((rows,), generator))
        else:
            u = torch.rand(rows, generator=generator)
            if settings.sampling == "mode":
                u = 1 - u - settings.mode_scale * (torch.cos(torch.pi / 2 * u).square() - 1 + u)
        return self.student.convention.level(shift_sigma(u, self.student.shift))

    def drop_captions(self, batch: TrainBatch, generator: torch.Generator) -> TrainBatch:
        """The batch, some of whose samples read what the unconditional branch reads."""
        dropped = torch.rand(batch.rows, generator=generator) < self.settings.caption_dropout
        if not dropped.any():
            return batch
        nothing = self.student.text_of(batch, conditional=False)
        return replace(batch, text=batch.text.replaced(dropped, nothing))


def snr_weight(convention: Convention, s: Tensor, gamma: float) -> Tensor:
    """Min-SNR weight of each sample's squared error at levels `s` (table 1 of arXiv 2303.09556), in terms of what the
    convention predicts."""
    snr = (convention.alpha(s) / s).square()
    least = snr.clamp(max=gamma)
    match convention.prediction:
        case "epsilon":
            return least / snr
        case "v":
            return least / (snr + 1)
        case _:
            return least
