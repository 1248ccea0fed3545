"""What a step of training sees: latents, prompts, and what else a family's network is conditioned on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from typing_extensions import Self


@dataclass(frozen=True, slots=True)
class Text:
    """Encoded prompts.

    Attributes:
        states: [B, L, D], zero beyond the true lengths.
        lengths: [B] true token counts.
        extra: further states of the same prompts, [B, ...] each, by the names of the family's network.
    """

    states: Tensor
    lengths: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def expand(self, rows: int) -> Text:
        """One prompt for all of `rows` samples."""
        extra = {k: v.expand(rows, *v.shape[1:]) for k, v in self.extra.items()}
        return Text(self.states.expand(rows, -1, -1), self.lengths.expand(rows), extra)

    def to(self, device: torch.device) -> Text:
        """The states on a device; lengths stay where they are, since they are read as numbers."""
        return Text(self.states.to(device), self.lengths, {k: v.to(device) for k, v in self.extra.items()})

    def replaced(self, rows: Tensor, other: Text) -> Text:
        """These prompts, but `other`'s where the mask `rows` [B] says so."""
        extra = {k: _choose(rows, other.extra[k], v) for k, v in self.extra.items()}
        return Text(_choose(rows, other.states, self.states), _choose(rows, other.lengths, self.lengths), extra)


def _choose(rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Rows of `a` where the mask [B] is true, of `b` elsewhere."""
    return torch.where(rows.to(b.device).view(-1, *[1] * (b.ndim - 1)), a, b)


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """What a step sees.

    Attributes:
        latents: [B, C, T, H, W] float32, normalised.
        text: of the samples.
        captions: that it was made from.
        extra: what else a family's network is conditioned on, float32 [B, ...] each (actions, first frames), as the
            source gave it and the family's plugin reads it.
    """

    latents: Tensor
    text: Text
    captions: tuple[str, ...] = ()
    extra: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    @property
    def rows(self) -> int:
        """B."""
        return len(self.latents)

    def to(self, device: torch.device) -> Self:
        """What the network reads, on a device, in float32."""
        extra = {k: v.to(device, torch.float32) for k, v in self.extra.items()}
        latents = self.latents.to(device, torch.float32)
        return replace(self, latents=latents, text=self.text.to(device), extra=extra)
