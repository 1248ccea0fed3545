"""Distillation on the trajectories of a teacher: from any of the few levels, the student says where the ODE ends.

What is regressed is deterministic (a noise has one end), so it needs no adversary and no score: it is how few-step
students are started before distribution matching, and the only thing a causal one can be started from (CausVid, arXiv
2412.07772, section 4.3). Its pictures are soft; the methods that follow make them sharp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kinetoscope.core.errors import ConfigError
from kinetoscope.train.data.ode_pairs import OdeBatch
from kinetoscope.train.methods.base import MethodSettings
from kinetoscope.train.roles import CausalModelBase, ModelBase, TrainBatch


class OdeDistillSettings(MethodSettings):
    """Settings of `OdeDistill`.

    Attributes:
        past: what a block of a causal student sees of the blocks before it: "clean", the ends of their trajectories, as
            in sampling, or, for half the work, "noisy", each at a level of its own, of which the end is one.
    """

    name: Literal["ode_distill"] = "ode_distill"  # pyright: ignore[reportIncompatibleVariableOverride]
    past: Literal["noisy", "clean"] = "noisy"

    def unread_options(self) -> dict[str, str]:
        """Return the options of branches and noise levels, which the trajectories of the data bring."""
        return {
            "student.uncond": "ode_distill predicts the conditional branch alone",
            "student.shift": "noise levels are those of the trajectories (data.shift)",
        }


class OdeDistill:
    """Mean squared error of the clean latents, from the teacher's own samples at one level a sample, or, for a causal
    student, one a block. Needs batches of `OdePairs`."""

    settings_class: ClassVar[type[MethodSettings]] = OdeDistillSettings
    needs: ClassVar[tuple[str, ...]] = ("student",)

    def __init__(self, roles: Mapping[str, ModelBase], settings: OdeDistillSettings) -> None:
        self.roles, self.settings = roles, settings
        if settings.past == "clean" and not isinstance(roles["student"], CausalModelBase):
            raise ConfigError("method.past=clean is of causal students; this one sees the whole video at once")

    def updates(self, step: int) -> Sequence[str]:
        """The student, in every step."""
        return ("student",)

    def losses(self, role: str, batch: TrainBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The error over a batch.

        Raises:
            ConfigError: the batch has no trajectories.
        """
        if not isinstance(batch, OdeBatch):
            raise ConfigError("method ode_distill learns from trajectories; set data.source=ode_pairs")
        student = self.roles[role]
        frames = batch.latents.shape[2]
        blocks = student.blocks(frames) if isinstance(student, CausalModelBase) else (frames,)
        path, levels, more = batch.path, batch.levels, dict[str, Any]()
        if self.settings.past == "clean":
            more["clean"] = batch.latents
        elif isinstance(student, CausalModelBase):
            path, levels = torch.cat([path, batch.latents.unsqueeze(1)], 1), (*levels, 0.0)
        picked = torch.randint(0, len(levels), (batch.rows, len(blocks)), generator=generator)
        picked = torch.repeat_interleave(picked, torch.tensor(blocks), dim=1)  # [B, T]
        x, s = take_levels(path, picked), torch.tensor(levels)[picked].to(path.device)
        x0 = student.predict_x0(x, s if len(blocks) > 1 else s[:, 0], batch, **more)
        return {"total": (x0 - batch.latents).square().mean()}


def take_levels(path: Tensor, picked: Tensor) -> Tensor:
    """Frames of trajectories, each at a level of its own: [B, K, C, T, H, W] and [B, T] in [0, K) -> [B, C, T, H, W]"""
    rows, frames = torch.arange(len(path)), torch.arange(path.shape[3])
    chosen = path.transpose(2, 3)[rows[:, None], picked, frames]  # [B, T, C, H, W]
    return chosen.transpose(1, 2)
