"""What a worker process is told, and what it says."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from kinetoscope.core.errors import KinetoscopeError
from kinetoscope.loading import ModelDir
from kinetoscope.parallel import ParallelConfig


@dataclass(frozen=True, slots=True)
class Setup:
    """How a worker opens its model.

    Attributes:
        rank: in `config`, which is the layout of one replica.
        config: the layout.
        model: its directory.
        device: of this rank.
        dtype: of the transformer.
        options: of `VideoGenerator.from_pretrained`.
        store: where the ranks meet: a file of this machine, or (host, port) of one that waits for them.
        timeout: seconds that one waits for the others.
        stall: seconds without a sign of life after which it counts as stopped.
        threads: of torch.
        level: of what this package logs.
        extensions: modules that a worker imports before it opens the model.
    """

    rank: int
    config: ParallelConfig
    model: ModelDir
    device: torch.device
    dtype: torch.dtype
    options: Mapping[str, Any]
    store: str | tuple[str, int]
    timeout: float
    stall: float
    threads: int
    level: int
    extensions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Status:
    """What a worker is doing.

    Attributes:
        stage: "starting", "idle", or a stage of the pipeline.
        step: steps finished in this stage.
        count: events since it started: who has the fewest is who the others wait for.
    """

    stage: str = "starting"
    step: int = 0
    count: int = 0

    def after(self, event: Any) -> Status:
        """After an event of a run."""
        count = self.count + 1
        if event.kind == "stage_start":
            return Status(event.stage, 0, count)
        if event.kind == "step":
            return Status(self.stage, self.step + 1, count)
        return replace(self, count=count)


# -- to a worker ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Order:
    """Do something.

    Attributes:
        number: by which the answer is known.
        kind: method of `Worker` without its underscore.
        payload: what the method gets.
    """

    number: int
    kind: str
    payload: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Cancel:
    """Give up the order of this number."""

    number: int


@dataclass(frozen=True, slots=True)
class Stop:
    """Do what came before, then end."""


Told = Order | Cancel | Stop


# -- from a worker ----------------------------------------------------------------------------------------------------

OPENING = -1
"""Number of what is no order: opening the model."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The model is open."""


@dataclass(frozen=True, slots=True)
class Beat:
    """A sign of life."""

    status: Status


@dataclass(frozen=True, slots=True)
class Happened:
    """An event of an order."""

    number: int
    event: Any


@dataclass(frozen=True, slots=True)
class Done:
    """An order is carried out; the first rank's value is what it comes to."""

    number: int
    value: Any


@dataclass(frozen=True, slots=True)
class Cancelled:
    """An order was given up, as was asked."""

    number: int


@dataclass(frozen=True, slots=True)
class Failed:
    """An order failed.

    Attributes:
        number: of the order, or `OPENING`.
        cause: "memory" or "failed".
        text: of the error, with its kind.
        error: itself, if it is of this package.
        status: when it failed.
    """

    number: int
    cause: str
    text: str
    error: KinetoscopeError | None
    status: Status


@dataclass(frozen=True, slots=True)
class Died:
    """The process is gone; said by who watches it."""

    how: str


Said = Ready | Beat | Happened | Done | Cancelled | Failed | Died


def sendable(error: Exception) -> Exception:
    """Return the error if it survives pickling, else a `KinetoscopeError` that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        text = " ".join(str(error).split())
        return KinetoscopeError(f"{type(error).__name__}: {text}" if text else type(error).__name__)
    return error
