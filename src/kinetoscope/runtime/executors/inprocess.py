"""Requests carried out here and now: the only executor that hooks of a program and shared modules work with."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

from kinetoscope.parallel import Groups, ParallelConfig
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.runtime.executors.base import Health, Job
from kinetoscope.runtime.lora import Loras
from kinetoscope.runtime.preview import Previews
from kinetoscope.runtime.request import VideoPlan
from kinetoscope.runtime.results import ResultEvent
from kinetoscope.runtime.running import RunEvent, open_previews, run_plan


class InProcess:
    """Runs a pipeline in the caller's process, which may be one of a layout.

    Args:
        pipeline: of the model.
        loras: its LoRAs.
        groups: this process's place in a layout; all its processes run the same jobs, and the first writes the files.
    """

    name = "in-process"

    def __init__(self, pipeline: ComposedPipeline, loras: Loras, groups: Groups | None = None) -> None:
        self.pipeline = pipeline
        self.loras = loras
        self.config = groups.config if groups else ParallelConfig()
        self.announces = groups is None  # else another process has the caller
        self.leads = groups is None or groups.everyone.index == 0

    def run(self, job: Job) -> Generator[RunEvent, None, list[ResultEvent]]:
        """See `Executor.run`. Only the first process of a layout writes, and makes previews."""
        plan = replace(job.plan, hooks=list(job.plan.hooks))
        if not self.leads:
            plan = replace(plan, paths=[None] * len(plan.paths))
        previews = open_previews(self.pipeline, job.preview, plan) if self.leads else None
        return self._run(job, plan, previews)

    def _run(
        self, job: Job, plan: VideoPlan, previews: Previews | None
    ) -> Generator[RunEvent, None, list[ResultEvent]]:
        with self.loras.run():
            options = dict(job.options)  # LoRAs may be set for later runs before this one ends
            return (yield from run_plan(self.pipeline, options, plan, job.size, previews))

    def health(self) -> list[Health]:
        """None: there are no other processes."""
        return []

    def close(self) -> None:
        """Nothing to end."""
