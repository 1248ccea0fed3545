"""A checked request on its way to finished videos: in batches, with their files and records."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from kinetoscope.core.types import ForwardBatch, SamplingParams
from kinetoscope.engine.hooks.base import arrange
from kinetoscope.engine.protocols import Event
from kinetoscope.media import write_video
from kinetoscope.pipelines.composed import ComposedPipeline, StageEvent
from kinetoscope.pipelines.preflight import check_component_files
from kinetoscope.runtime.notices import NoticeEvent
from kinetoscope.runtime.preview import PreviewEvent, Previews, load_preview_map
from kinetoscope.runtime.record import make_record
from kinetoscope.runtime.request import VideoPlan, VideoRequest

BATCH_TOKENS = 2048
"""Prompts of a list share a run while its rows have at most this many tokens; beyond, a batch only costs memory."""

RunEvent = StageEvent | Event | PreviewEvent | NoticeEvent


@dataclass(slots=True)
class GenerationResult:
    """One generated video.

    Attributes:
        frames: uint8 [T, H, W, 3].
        latents: float32 [C, T, H, W] on the CPU: the final sample in the transformer's normalised space, as diffusers'
            `output_type="latent"`.
        path: the written file, if one was asked for.
        timings: stage -> seconds of the run that made it (shared by the prompts of one batch); "writing" is the file's.
        seed, prompt, params: what made it.
        logging_info: what hooks report: `denoising_perf`, `step_trace`.
        record: everything `replay` needs; also stored in the mp4.
    """

    frames: np.ndarray[Any, Any]
    latents: Tensor
    path: Path | None
    timings: dict[str, float]
    seed: int
    prompt: str
    params: SamplingParams
    logging_info: dict[str, Any] = field(default_factory=dict[str, Any])
    record: dict[str, Any] = field(default_factory=dict[str, Any])


def plan_request(pipeline: ComposedPipeline, defaults: SamplingParams, request: VideoRequest) -> VideoPlan:
    """The request, resolved and checked for a model.

    Raises:
        ModelLoadError: the files of a component that is not loaded yet cannot be loaded.
        InputError: a field is out of range.
        OutputError: an output cannot be written.
        CompositionError: a hook of the call lacks a method, or conflicts with another one.
    """
    follows = "control" in pipeline.tasks
    plan = request.plan(defaults, pipeline.geometry, pipeline.inputs, pipeline.extra_defaults,
                        continues="v2v" not in pipeline.tasks and not follows, follows=follows)  # fmt: skip
    pipeline.check(plan.params)
    arrange([*pipeline.hooks, *plan.hooks])
    check_component_files(pipeline)
    return plan


def open_previews(pipeline: ComposedPipeline, preview: bool | str | Path, plan: VideoPlan) -> Previews | None:
    """What makes small frames of every step, its hook among the plan's; None where none are asked for."""
    if preview is False:
        return None
    previews = Previews(load_preview_map(pipeline.model, None if preview is True else Path(preview)))
    plan.hooks.append(previews.hook)
    return previews


def usual_batch_size(pipeline: ComposedPipeline, params: SamplingParams) -> int:
    """Prompts of a list that run together."""
    assert params.num_frames and params.height and params.width
    tokens = pipeline.geometry.tokens(params.num_frames, params.height, params.width)
    return max(1, BATCH_TOKENS // (tokens * pipeline.rows(params)))


def run_plan(
    pipeline: ComposedPipeline,
    options: Mapping[str, Any],
    plan: VideoPlan,
    size: int,
    previews: Previews | None,
    *,
    records: bool = True,
) -> Generator[RunEvent, None, list[GenerationResult]]:
    """Make the videos of a plan, `size` at a time, yielding events; the return value is their results.

    Without `records` the results have none: it takes reading all files of the model.
    """
    results: list[GenerationResult] = []
    for start in range(0, len(plan.prompts), size):
        part = slice(start, start + size)
        given: dict[str, Any] = {name: value[part] for name, value in plan.given().items()}
        batch = ForwardBatch(
            plan.params,
            plan.prompts[part],
            plan.negative_prompts[part],
            plan.seeds[part],
            hooks=list(plan.hooks),
            **given,
        )
        if batch.size > 1 and pipeline.joins(batch):
            runs = pipeline.iterate_together(batch.samples())
            done = yield from runs if previews is None else previews.among(runs, start)
            batch = ForwardBatch.joined(done)
        else:
            run = pipeline.iterate(batch)
            batch = yield from run if previews is None else previews.among(run, start)
            done = [batch] * batch.size
        for index, path in enumerate(plan.paths[part]):
            record = make_record(pipeline, options, batch, index, given) if records else {}
            results.append(_finish(batch, index, path, record, done[index].logging_info))
    return results


def _finish(
    batch: ForwardBatch, index: int, path: Path | None, record: dict[str, Any], logging_info: dict[str, Any]
) -> GenerationResult:
    """The result of one sample, its file written."""
    assert batch.latents is not None and batch.params.fps is not None
    timings = dict(batch.timings)
    if path is not None:
        start = time.perf_counter()
        write_video(path, batch.frames[index], batch.params.fps, metadata=record)
        timings["writing"] = time.perf_counter() - start
    return GenerationResult(
        frames=batch.frames[index],
        latents=batch.latents[index].float().cpu(),
        path=path,
        timings=timings,
        seed=batch.seeds[index],
        prompt=batch.prompts[index],
        params=batch.params,
        logging_info=logging_info,
        record=record,
    )
