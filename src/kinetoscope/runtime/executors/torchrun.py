"""Every process that torchrun started runs the same script, and is one rank: `executor="torchrun"`."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from kinetoscope.core.config import launch
from kinetoscope.core.errors import ConfigError
from kinetoscope.parallel import Groups, ParallelConfig
from kinetoscope.parallel.groups import join_started, leave
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.runtime.executors.base import Job, part_of, replica_shares
from kinetoscope.runtime.executors.inprocess import InProcess
from kinetoscope.runtime.executors.orders import sendable
from kinetoscope.runtime.lora import Loras
from kinetoscope.runtime.request import VideoPlan
from kinetoscope.runtime.results import ResultEvent, moved
from kinetoscope.runtime.running import RunEvent


def join_launch(config: ParallelConfig, device: torch.device, timeout: float) -> Groups:
    """This process's place in a layout that torchrun started; see `join_started`.

    Raises:
        ConfigError: torchrun did not start this process, or started another number of them.
    """
    started = launch()
    if started is None:
        raise ConfigError(
            "executor='torchrun': this process was not started by torchrun; "
            f"use `torchrun --nproc-per-node {config.world} SCRIPT`, or executor='processes'"
        )
    return join_started(config, started, device, timeout)


class Torchrun(InProcess):
    """As in-process, as one of several: replicas share out the videos, and every process gets all results.

    Args:
        pipeline: of the model, opened as this rank.
        loras: its LoRAs.
        groups: this process's place.
    """

    name = "torchrun"

    def __init__(self, pipeline: ComposedPipeline, loras: Loras, groups: Groups) -> None:
        super().__init__(pipeline, loras, groups)
        self.groups = groups
        self.announces = self.leads
        # Results are objects in host memory: gloo moves them whatever moves the tensors of the model.
        self._words: Any = dist.new_group(backend="gloo") if groups.config.replicas > 1 else None

    def run(self, job: Job) -> Generator[RunEvent, None, list[ResultEvent]]:
        """See `Executor.run`; events are those of this replica. All processes must run the same jobs to their end."""
        if self._words is None:
            return super().run(job)
        return self._share(job, job.plan)

    def close(self) -> None:
        """Part from the other processes."""
        leave()

    def _share(self, job: Job, plan: VideoPlan) -> Generator[RunEvent, None, list[ResultEvent]]:
        """The videos of this replica, and then those of the others."""
        replicas, own = self.groups.replica.size, self.groups.replica.index
        made: dict[int, ResultEvent] = {}
        for part in replica_shares(len(plan.prompts), job.size, replicas)[own::replicas]:
            mine = Job(part_of(plan, part, plan.paths[part]), job.size, job.options, job.trace, job.preview)
            events = super().run(mine)
            try:
                for event in events:
                    event = moved(event, part.start)
                    if isinstance(event, ResultEvent):
                        made[event.index] = event
                    yield event
            finally:
                events.close()
        told: list[Any] = [None] * self.groups.config.world
        sent = {i: replace(e, error=e.error and sendable(e.error)) for i, e in made.items()} if self.leads else {}
        dist.all_gather_object(told, sent, group=self._words)
        return [next(some[i] for some in told if i in some) for i in range(len(plan.prompts))]
