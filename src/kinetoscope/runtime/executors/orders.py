"""What a worker process is told to open, and what it says it is doing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

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
        store: where the ranks meet: a file of this machine, or (host, port).
        timeout: seconds that one waits for the others.
        stall: seconds without a sign of life after which it counts as stopped.
        threads: of torch.
        level: of what this package logs.
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
