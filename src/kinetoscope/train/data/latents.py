"""Batches from a data set of `kinetoscope preprocess`: shuffled, of one shape each, and at a place that the step says.

An epoch is shuffled in two stages, so that reading stays local and nothing but numbers is held in memory: the shards
are put in a random order, and the rows of a few neighbours in that order are mixed. All of it is computed from (seed,
epoch), so batch number n is the same however training came to it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from kinetoscope.core.errors import ConfigError
from kinetoscope.train.data import DataSection, SourceContext
from kinetoscope.train.data.table import DataSet
from kinetoscope.train.recipe import Positive
from kinetoscope.train.roles import Text, TrainBatch

Array = np.ndarray[Any, Any]


class LatentData(DataSection):
    """Settings of `LatentSource`.

    Attributes:
        path: folder of the data set.
        batch: samples of a micro-batch.
        seed: of the order.
        mix: shards whose rows are shuffled among each other.
        alike: so many consecutive batches have one shape: all micro-batches and ranks of an update should.
    """

    path: str
    batch: Positive = 8
    seed: int = Field(0, ge=0)
    mix: Positive = 16
    alike: Positive = 1


class Order:
    """Which rows are in which batch.

    An epoch shows every row; the last batches of a shape are filled with rows from the beginning of its order. Batches
    of different numbers in an epoch share no other rows, so ranks that take different numbers see different data.

    Args:
        rows: shard -> shape of each of its rows, as `DataSet.rows`.
        batch, seed, mix, alike: see `LatentData`.
    """

    def __init__(self, rows: list[list[int]], batch: int, seed: int = 0, mix: int = 16, alike: int = 1) -> None:
        self.batch, self.seed, self.mix, self.alike = batch, seed, mix, alike
        shards = [np.asarray(r, np.int64) for r in rows]
        kinds = sorted({b for r in rows for b in r})
        self._rows: list[dict[int, Array]] = []  # shape -> shard -> its rows of that shape
        for kind in kinds:
            found = {n: np.flatnonzero(shard == kind) for n, shard in enumerate(shards)}
            self._rows.append({n: r for n, r in found.items() if len(r)})
        self.counts = [sum(map(len, r.values())) for r in self._rows]
        self._units = [-(-n // (batch * alike)) for n in self.counts]
        self._schedule = lru_cache(maxsize=2)(self._make_schedule)
        self._shards = lru_cache(maxsize=2 * len(kinds) or 1)(self._make_shards)
        self._mixed = lru_cache(maxsize=4 * len(kinds) or 1)(self._mix)

    @property
    def epoch_batches(self) -> int:
        """Batches of an epoch."""
        return sum(self._units) * self.alike

    def rows(self, number: int) -> list[tuple[int, int]]:
        """(shard, row) of the samples of batch `number`."""
        epoch, inside = divmod(number, self.epoch_batches)
        unit, rest = divmod(inside, self.alike)
        kinds, ordinals = self._schedule(epoch)
        kind = int(kinds[unit])
        first = (int(ordinals[unit]) * self.alike + rest) * self.batch
        return [self._row(epoch, kind, (first + j) % self.counts[kind]) for j in range(self.batch)]

    def _make_schedule(self, epoch: int) -> tuple[Array, Array]:
        """Shape of each unit of an epoch, and how many of that shape were before it."""
        kinds = np.random.default_rng([self.seed, epoch]).permutation(
            np.repeat(np.arange(len(self._units)), self._units)
        )
        ordinals = np.empty_like(kinds)
        for kind, count in enumerate(self._units):
            ordinals[kinds == kind] = np.arange(count)
        return kinds, ordinals

    def _make_shards(self, epoch: int, kind: int) -> tuple[Array, Array]:
        """The shards that hold a shape in the order of an epoch, and where each group of `mix` ends."""
        rows = self._rows[kind]
        order = np.random.default_rng([self.seed, epoch, kind]).permutation(np.fromiter(rows, np.int64))
        lengths = np.array([len(rows[int(n)]) for n in order])
        starts = np.arange(0, len(order), self.mix)
        return order, np.cumsum(np.add.reduceat(lengths, starts))

    def _mix(self, epoch: int, kind: int, group: int) -> Array:
        """[n, 2] (shard, row) of a group of shards, shuffled."""
        order, _ = self._shards(epoch, kind)
        shards = order[group * self.mix : (group + 1) * self.mix].tolist()
        pairs = [np.stack([np.full(len(self._rows[kind][n]), n), self._rows[kind][n]], 1) for n in shards]
        return np.random.default_rng([self.seed, epoch, kind, group]).permutation(np.concatenate(pairs))

    def _row(self, epoch: int, kind: int, place: int) -> tuple[int, int]:
        _, ends = self._shards(epoch, kind)
        group = int(np.searchsorted(ends, place, side="right"))
        shard, row = self._mixed(epoch, kind, group)[place - (int(ends[group - 1]) if group else 0)]
        return int(shard), int(row)


class LatentSource:
    """Rows of a data set (`LatentData`).

    Raises:
        InputError: there is no finished data set.
        ConfigError: it was made with other encoders than the model's, or holds no rows.
    """

    settings_class: ClassVar[type[LatentData]] = LatentData

    def __init__(self, settings: LatentData, context: SourceContext) -> None:
        self.data = DataSet(settings.path)
        if wrong := self.data.manifest.identity.refusal(context.opened.model):
            raise ConfigError(f"data set {settings.path} was {wrong}; make it anew for this model")
        if not len(self.data):
            raise ConfigError(f"data set {settings.path} holds no rows; its rejected.jsonl says why")
        self.order = Order(self.data.rows, settings.batch, settings.seed, settings.mix, settings.alike)

    def inputs(self) -> dict[str, str]:
        """Return the digest of the data set."""
        return {"data rows": self.data.digest()}

    def batch(self, step: int, generator: torch.Generator) -> TrainBatch:
        """Batch number `step`; the order has a seed of its own, so nothing is drawn from `generator`."""
        rows = [self.data.row(*place) for place in self.order.rows(step)]
        return TrainBatch(
            torch.stack([r["latents"] for r in rows]), self._text(rows), tuple(r["caption"] for r in rows)
        )

    def _text(self, rows: list[dict[str, Any]]) -> Text:
        length = self.data.manifest.text_tokens
        states: list[Tensor] = [r["text_states"] for r in rows]
        padded = [nn.functional.pad(s, (0, 0, 0, length - len(s))) for s in states]
        return Text(torch.stack(padded), torch.tensor([len(s) for s in states]))
