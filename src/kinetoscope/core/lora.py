"""Changes of weights that a file adds to a model: products of two thin matrices, or whole tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """scale * up @ down (LoRA, arXiv 2106.09685).

    Attributes:
        down: [r, in, ...]: further axes are those of a convolution's kernel.
        up: [out, r, ...]: further axes have size 1.
        scale: alpha / r, or what the file's configuration says in its place.
    """

    down: Tensor
    up: Tensor
    scale: float

    def delta(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """The change of a weight of `shape`, float32 on `device`."""
        up, down = (t.to(device, torch.float32).flatten(1) for t in (self.up, self.down))
        return (self.scale * (up @ down)).view(*shape)


@dataclass(frozen=True, slots=True, eq=False)
class Full:
    """scale * value, for weights, biases, norms and modulation tables alike.

    Attributes:
        value: as many numbers as the parameter has, in its order.
    """

    value: Tensor
    scale: float = 1.0

    def delta(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """The change of a parameter of `shape`, float32 on `device`."""
        return self.scale * self.value.to(device, torch.float32).view(*shape)


Change = LowRank | Full
Weighted = tuple[tuple[Change, float], ...]
"""Changes of one parameter with the weights that the user gave them; they add up."""
