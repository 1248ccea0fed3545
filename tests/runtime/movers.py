"""Movers of weights for tests of offload."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


class Elsewhere:
    """A mover that leaves tensors without values behind, so that using a weight that is away cannot go unseen."""

    def __init__(self) -> None:
        self.kept: dict[int, Tensor] = {}
        self.stand_ins: list[Tensor] = []

    def park(self, tensor: Tensor) -> Tensor:
        stand_in = torch.empty_like(tensor, device="meta")
        if isinstance(tensor, nn.Parameter):
            stand_in = nn.Parameter(stand_in, requires_grad=False)
        self.kept[id(stand_in)] = tensor.detach().clone()
        self.stand_ins.append(stand_in)
        return stand_in

    def bring(self, parked: Tensor) -> Tensor:
        return self.kept[id(parked)].clone()

    def ahead(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def sent(self) -> Any:
        return None

    def arrived(self, mark: Any, tensors: Any) -> None:
        pass
