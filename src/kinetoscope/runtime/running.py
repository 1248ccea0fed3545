"""A checked request on its way to finished videos: in batches, with their files and records."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kinetoscope.core.errors import RunCancelled
from kinetoscope.core.types import ForwardBatch, SamplingParams
from kinetoscope.engine.hooks.base import arrange
from kinetoscope.engine.protocols import Event
from kinetoscope.media import write_video
from kinetoscope.pipelines.composed import ComposedPipeline, StageEvent
from kinetoscope.pipelines.preflight import (
    check_component_files,
    check_settings,
    chooses_solver,
    without_unread_shift,
)
from kinetoscope.runtime.model_hash import ModelHash
from kinetoscope.runtime.notices import NoticeEvent
from kinetoscope.runtime.preview import PreviewEvent, Previews, load_preview_map
from kinetoscope.runtime.record import make_record
from kinetoscope.runtime.request import VideoPlan, VideoRequest
from kinetoscope.runtime.results import GenerationResult, ResultEvent

logger = logging.getLogger(__name__)

BATCH_TOKENS = 2048
"""Prompts of a list share a run while its rows have at most this many tokens; beyond, a batch only costs memory."""

RunEvent = StageEvent | Event | PreviewEvent | NoticeEvent | ResultEvent


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
    plan = replace(plan, params=without_unread_shift(pipeline, plan.params, defaults, request.given()))
    check_settings(pipeline, plan.params, defaults, request.given(), plan.given())
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
) -> Generator[RunEvent, None, list[ResultEvent]]:
    """Make the videos of a plan, `size` at a time, yielding events; the return value is the outcome of each prompt.

    A prompt that fails (`ExecutionArgs.run_errors`) leaves the others as they are. Each outcome is also an event, as
    soon as it is known. Without `records` the results have none: it takes reading all files of the model.
    """
    outcomes: list[ResultEvent] = []
    hashing = ModelHash(pipeline.model)
    for start in range(0, len(plan.prompts), size):
        videos = range(start, min(start + size, len(plan.prompts)))
        part = slice(videos.start, videos.stop)
        given: dict[str, Any] = {name: value[part] for name, value in plan.given().items()}
        batch = ForwardBatch(
            plan.params,
            plan.prompts[part],
            plan.negative_prompts[part],
            plan.seeds[part],
            hooks=list(plan.hooks),
            videos=tuple(videos),
            solver_chosen=chooses_solver(pipeline, plan.params),
            **given,
        )
        events = _run_batch(pipeline, batch)
        if records:
            events = hashing.among(events)
        for index, made in zip(videos, (yield from previews.among(events) if previews else events), strict=True):
            if isinstance(made, Exception):
                outcome = ResultEvent((index,), error=made)
            else:
                yield from hashing.wait((index,))
                outcome = _finish(pipeline, options, made, plan, index, records=records)
            outcomes.append(outcome)
            yield outcome
    return outcomes


@dataclass(frozen=True, slots=True)
class _Made:
    """Sample `index` of a finished batch; `joined` videos were computed together."""

    batch: ForwardBatch
    index: int
    joined: int


def _run_batch(
    pipeline: ComposedPipeline, batch: ForwardBatch
) -> Generator[StageEvent | Event, None, list[_Made | Exception]]:
    """Make the videos of a batch together; each of them is made or has an error."""
    samples = batch.samples() if batch.size > 1 else [batch]
    if batch.size > 1 and pipeline.joins(batch):
        done = yield from pipeline.iterate_together(samples)
        return [d if isinstance(d, Exception) else _Made(d, 0, batch.size) for d in done]
    try:
        batch = yield from pipeline.iterate(batch)
    except pipeline.args.run_errors as error:
        if batch.size == 1 or isinstance(error, RunCancelled):
            return [error] * batch.size
        text = " ".join(str(error).split())
        logger.warning("a run of %d videos failed (%s: %s); each is made alone", batch.size, type(error).__name__, text)
    else:
        return [_Made(batch, index, batch.size) for index in range(batch.size)]
    alone: list[_Made | Exception] = []
    for sample in samples:
        try:
            alone.append(_Made((yield from pipeline.iterate(sample)), 0, 1))
        except pipeline.args.run_errors as error:
            alone.append(error)
    return alone


def _finish(
    pipeline: ComposedPipeline, options: Mapping[str, Any], made: _Made, plan: VideoPlan, index: int, *, records: bool
) -> ResultEvent:
    """Return the outcome of a finished sample, its file written."""
    batch, sample, path = made.batch, made.index, plan.paths[index]
    assert batch.latents is not None and batch.params.fps is not None
    given = {name: value[index : index + 1] for name, value in plan.given().items()}
    record = make_record(pipeline, options, batch, sample, given, joined=made.joined) if records else {}
    result = GenerationResult(
        frames=batch.frames[sample],
        latents=batch.latents[sample].float().cpu(),
        path=None,
        timings=dict(batch.timings),
        seed=batch.seeds[sample],
        prompt=batch.prompts[sample],
        params=batch.params,
        logging_info=batch.logging_info,
        record=record,
    )
    return write_result(result, path, index)


def write_result(result: GenerationResult, path: Path | None, index: int) -> ResultEvent:
    """Return the outcome of video `index`, its file written; the result is there also where it cannot be written."""
    if path is None:
        return ResultEvent((index,), result)
    assert result.params.fps is not None
    start = time.perf_counter()
    try:
        write_video(path, result.frames, result.params.fps, metadata=result.record)
    except Exception as error:  # no other process waits for the file, so every error is this video's alone
        return ResultEvent((index,), result, error)
    result.timings["writing"] = time.perf_counter() - start
    result.path = path
    return ResultEvent((index,), result)
