"""Which part of a weight a device holds, as values that the layers which read, place and compute share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """How a model's weights are shared out; a family gives it as data.

    Attributes:
        styles: pattern of names -> style (`parallel.tensor.STYLES`); `*` stands for anything. A pattern that ends in
            "?" is of a part that not every model has.
        outside: what is called of each block before the blocks run, by name in the block ("attn2.project").
        roots: and of the whole model.
        may_be_whole: a model whose heads do not divide is on every device, instead of being refused; for encoders,
            whose heads are not chosen with the layout in mind.
        twice: some of `outside` is called in every step where frames have timesteps of their own, so that FSDP gathers
            each block twice a step of a video with given frames.
    """

    styles: Mapping[str, str]
    outside: tuple[str, ...] = ()
    roots: tuple[str, ...] = ("prepare_conditioning", "prepare_timesteps", "prepare_shared")
    may_be_whole: bool = False
    twice: bool = False


@dataclass(frozen=True, slots=True)
class Cut:
    """Part `index` of `count` along `dim`; of each of `parts` equal parts, for layers that are several side by side.

    Where `count` does not divide, the last parts are smaller, or empty.
    """

    dim: int
    index: int
    count: int
    parts: int = 1

    def of(self, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """What is left of [start, stop) spans, taken as one row of entries."""
        size = sum(stop - start for start, stop in spans)
        part = size // self.parts
        step = -(-part // self.count)
        kept: list[tuple[int, int]] = []
        for number in range(self.parts):
            first = number * part + min(self.index * step, part)
            kept += _within(spans, first, number * part + min((self.index + 1) * step, part))
        return kept


def spans_of(shape: Sequence[int], cuts: Sequence[Cut]) -> list[list[tuple[int, int]]]:
    """For each dimension of `shape`, the entries that are left after all `cuts` in their order."""
    spans = [[(0, size)] for size in shape]
    for cut in cuts:
        spans[cut.dim] = cut.of(spans[cut.dim])
    return spans


def take(tensor: Any, shape: Sequence[int], cuts: Sequence[Cut]) -> Tensor:
    """The own part of a tensor, or of what reads like one and only reads what is asked for (a slice of a file)."""
    return _take(tensor, (), spans_of(shape, cuts))


def _take(tensor: Any, chosen: tuple[slice, ...], spans: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
    if len(chosen) == len(spans):
        return tensor[chosen] if chosen else tensor[...]
    kept = spans[len(chosen)] or [(0, 0)]
    parts = [_take(tensor, (*chosen, slice(*span)), spans) for span in kept]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=len(chosen))


def _within(spans: Sequence[tuple[int, int]], first: int, last: int) -> list[tuple[int, int]]:
    """Entries number `first` to `last` of `spans`."""
    kept: list[tuple[int, int]] = []
    at = 0
    for start, stop in spans:
        low, high = max(first - at, 0), min(last - at, stop - start)
        if low < high:
            kept.append((start + low, start + high))
        at += stop - start
    return kept


class Share(Protocol):
    """The parts of a model's weights that this process holds."""

    def cuts(self, name: str) -> Sequence[Cut]:
        """Of a parameter, in order; none: all of it."""
        ...

    def held(self, name: str, own: Tensor) -> Tensor:
        """The own part of a parameter as the module takes it."""
        ...


_SHARES: WeakKeyDictionary[nn.Module, Share] = WeakKeyDictionary()


def keep_share(module: nn.Module, share: Share) -> None:
    """Remember what this process holds of a module."""
    _SHARES[module] = share


def share_of(module: nn.Module) -> Share | None:
    """What this process holds of a module; None: all of it."""
    return _SHARES.get(module)
