"""Layers that hold a part of their weights. A layer becomes one where it stands, by taking on its class.

What goes in and comes out are plain tensors of this device; weights are DTensors, so that a checkpoint knows the whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from kinetoscope.core.onednn import onednn_linear, onednn_serves
from kinetoscope.parallel.groups import Group
from kinetoscope.parallel.tensor.collectives import joined, spread, summed, summed_for_parts


def own(weight: Tensor) -> Tensor:
    """The part that this device holds."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if onednn_serves(x, weight):
        return onednn_linear(x, weight, bias)
    return F.linear(x, weight, bias)


class ColumnLinear(nn.Linear):
    """Some of the outputs. `out_features` is how many, since the heads of a device are counted by it."""

    group: Group

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out / P]"""
        bias = None if self.bias is None else own(self.bias)  # pyright: ignore[reportUnnecessaryComparison]
        return _product(spread(input, self.group), own(self.weight), bias)


class GatheredLinear(ColumnLinear):
    """Some of the outputs are computed, and all are given to everyone: for small inputs, such as modulation."""

    parts: int

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        return joined(super().forward(input), self.group, self.parts)


class RowLinear(nn.Linear):
    """All outputs, from some of the inputs; the bias is added once, to their sum."""

    group: Group

    def forward(self, input: Tensor) -> Tensor:
        """[..., in / P] -> [..., out]"""
        out = summed(_product(input, own(self.weight), None), self.group)
        if self.bias is None:  # pyright: ignore[reportUnnecessaryComparison]
            return out
        return out + own(self.bias) if out.requires_grad else out.add_(own(self.bias))


class SharedRMSNorm(nn.RMSNorm):
    """RMS norm over all heads, of which this device has some: the mean square is that of all devices.

    With each device's own mean square the model runs, and its output is wrong by some percent.
    """

    group: Group

    def forward(self, x: Tensor) -> Tensor:
        """[..., d / P] -> [..., d / P]"""
        floats = x.float()
        squares = summed_for_parts(floats.square().sum(dim=-1, keepdim=True), self.group)
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        out = floats * torch.rsqrt(squares / self.normalized_shape[0] + eps)
        return (out * own(self.weight).float()).to(x.dtype)


class VocabularyEmbedding(nn.Embedding):
    """Some of the words; those of others come out as zero, and the sum is everyone's."""

    group: Group
    first: int

    def forward(self, input: Tensor) -> Tensor:
        """[...] -> [..., d]"""
        weight = own(self.weight)
        words = input - self.first
        absent = (words < 0) | (words >= len(weight))
        found = F.embedding(words.masked_fill(absent, 0), weight)
        return summed(found.masked_fill(absent.unsqueeze(-1), 0), self.group)


class ColumnEmbedding(nn.Embedding):
    """Some of the columns of a table, such as a bias of each head."""

    group: Group

    def forward(self, input: Tensor) -> Tensor:
        """[...] -> [..., d / P]"""
        return F.embedding(input, own(self.weight))


def own_columns(module: nn.Module, args: tuple[Any, ...], group: Group) -> tuple[Any, ...]:
    """Arguments (x, table) of a forward, the table [N, c] cut to the columns that go with this device's of x."""
    x, table, *more = args
    width = table.shape[-1] // group.size
    return (x, table[..., group.index * width : (group.index + 1) * width], *more)
