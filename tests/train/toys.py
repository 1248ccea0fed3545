"""What methods train in closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kinetoscope.models.wan.spec import CONVENTION
from kinetoscope.train.roles import ModelBase


class Scale(nn.Module):
    """A network of one number: output = w x."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor, timestep: Tensor, **more: Any) -> Tensor:
        return self.w * x


class ToyModel(ModelBase):
    convention = CONVENTION
