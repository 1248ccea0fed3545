"""Notices before a run that will disappoint: unknown words, a size or length far from the trained one, many steps."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from kinetoscope.core.errors import KinetoscopeError
from kinetoscope.core.spec import nearest
from kinetoscope.core.types import SamplingParams
from kinetoscope.parallel import ParallelConfig
from kinetoscope.pipelines.catalogue import published_defaults
from kinetoscope.pipelines.composed import ComposedPipeline

MANY_STEPS = 200
"""A run of more steps gets a notice."""
WORLD_FACTOR, PUBLISHED_FACTOR = 1.5, 3.0
"""How many times the pixels of the trained size a video may have, or the inverse, without a notice. A model of a world
was trained at one size; published models at several (480p and 720p differ by 2.3)."""
LONGER = 1.25
"""How many times the trained length a video may have without a notice."""
SHOWN_WORDS = 6
ALIKE = 0.75
"""Likeness of an unknown word to a known one that is suggested for it."""
REMEMBERED = 256
"""Notices of a process that are not logged again."""

Result = TypeVar("Result")
logger = logging.getLogger("kinetoscope.notices")
_logged: OrderedDict[str, None] = OrderedDict()
_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class NoticeEvent:
    """A run is about to start that will disappoint.

    Attributes:
        topic: "words", "size", "length" or "steps".
        text: one line.
        kind: of the event.
    """

    topic: str
    text: str
    kind: str = "notice"


def notices(
    pipeline: ComposedPipeline,
    params: SamplingParams,
    prompts: Sequence[str],
    config: ParallelConfig,
    *,
    streaming: bool = False,
) -> list[NoticeEvent]:
    """Return the notices about a checked request.

    Args:
        pipeline: of the model; its tokenizer is loaded where the words of the prompts are looked up.
        params: the request, resolved.
        prompts: all texts that the model will read.
        config: the layout of devices, for the estimated time.
        streaming: whether the video has no end, so that its length says nothing.
    """
    found: list[NoticeEvent] = []
    if words := unknown_words(pipeline, prompts):
        found.append(NoticeEvent("words", _about_words(pipeline, words)))
    trained = trained_at(pipeline)
    if trained is not None and (about := _about_size(pipeline, params, trained, streaming)):
        topic, text = about
        found.append(NoticeEvent(topic, text + ("" if streaming else _cost(pipeline, params, config))))
    if params.num_inference_steps is not None and params.num_inference_steps > MANY_STEPS:
        usual = pipeline.defaults().num_inference_steps
        found.append(NoticeEvent("steps", f"{params.num_inference_steps} steps: more than {MANY_STEPS} rarely change a "
                                          f"video; the default of {pipeline.model.name} is {usual}"))  # fmt: skip
    return found


def announced(told: Sequence[NoticeEvent], events: Generator[Any, None, Result]) -> Generator[Any, None, Result]:
    """Log the notices that this process has not logged yet, and yield them before the events of the run."""
    try:
        for notice in told:
            log_once(notice)
            yield notice
        return (yield from events)
    finally:
        events.close()


def log_once(notice: NoticeEvent) -> None:
    """Log a notice, unless this process has logged it lately."""
    with _lock:
        known = notice.text in _logged
        _logged[notice.text] = None
        _logged.move_to_end(notice.text)
        if len(_logged) > REMEMBERED:
            _logged.popitem(last=False)
    if not known:
        logger.warning("note: %s", notice.text)


# -- words ------------------------------------------------------------------------------------------------------------


def unknown_words(pipeline: ComposedPipeline, prompts: Sequence[str]) -> list[str]:
    """Return the words of the prompts that a model of a world has not read in training, in order.

    The vocabulary of its tokenizer is that of the world's captions: a known word is one token, any other is spelled in
    letters. Other models have learned from more than their tokenizer shows, so nothing is said of them.
    """
    if "world" not in pipeline.model.sidecar or "tokenizer" not in pipeline.model.components():
        return []
    tokenizer = pipeline.get_module("tokenizer")
    words = dict.fromkeys(w for p in prompts for part in p.split() if (w := part.strip(".,;:!?\"'()[]")))
    return [w for w in words if len(tokenizer.tokenize(w)) != 1 or tokenizer.tokenize(w) == [tokenizer.unk_token]]


def _about_words(pipeline: ComposedPipeline, words: Sequence[str]) -> str:
    vocabulary = [w.lstrip("▁") for w in pipeline.get_module("tokenizer").get_vocab() if len(w) > 2]
    shown = [f"{w!r}" + (f" ({near}?)" if (near := nearest(w, vocabulary, ALIKE)) else "") for w in words[:SHOWN_WORDS]]
    more = f" and {len(words) - SHOWN_WORDS} more" if len(words) > SHOWN_WORDS else ""
    world = pipeline.model.sidecar["world"]
    return (
        f"{pipeline.model.name} does not know {', '.join(shown)}{more}; "
        f"it was trained on the captions of the world {world!r} alone"
    )


# -- size and length --------------------------------------------------------------------------------------------------


def trained_at(pipeline: ComposedPipeline) -> SamplingParams | None:
    """Return size and length that a model was trained at, or None if it is not known: its directory and its published
    name say nothing."""
    model = pipeline.model
    given = SamplingParams(**model.defaults) if model.defaults else published_defaults(model.name)
    return given if given is not None and given.height and given.width and given.num_frames else None


def _about_size(
    pipeline: ComposedPipeline, params: SamplingParams, trained: SamplingParams, streaming: bool
) -> tuple[str, str] | None:
    assert params.height and params.width and params.num_frames
    assert trained.height and trained.width and trained.num_frames
    name = pipeline.model.name
    ratio = params.height * params.width / (trained.height * trained.width)
    limit = WORLD_FACTOR if "world" in pipeline.model.sidecar else PUBLISHED_FACTOR
    long = (
        not (streaming or pipeline.streams or pipeline.any_length) and params.num_frames > LONGER * trained.num_frames
    )
    asked, usual = f"{params.height}x{params.width}", f"{trained.height}x{trained.width}"
    if not 1 / limit <= ratio <= limit:
        also = f" and {params.num_frames} frames" if long else ""
        usual += f" and {trained.num_frames} frames" if long else ""
        return "size", f"{asked} pixels{also}: {name} was trained at {usual}, and far from that its videos get worse"
    if long:
        return "length", (
            f"{params.num_frames} frames: {name} was trained at {trained.num_frames}, and longer videos of it get worse"
        )
    return None


def _cost(pipeline: ComposedPipeline, params: SamplingParams, config: ParallelConfig) -> str:
    """Return the estimated minutes and memory of a video; "" where they cannot be told from configurations."""
    from kinetoscope.runtime.auto import accelerator_here  # the cost model imports what a usual run does not need
    from kinetoscope.runtime.layouts import estimate
    from kinetoscope.runtime.workload import workload

    device = accelerator_here(pipeline.args.device)
    if device.name == "cpu":
        device = replace(device, tflops=device.tflops * torch.get_num_threads())
    try:
        found = estimate(replace(config, replicas=1), workload(pipeline, params), device)
    except KinetoscopeError:
        return ""
    seconds, peak = found.seconds, found.peak
    time = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:,.0f} minutes"
    return f". Estimate: {time}, {f'{peak / 2**20:.0f} MiB' if peak < 2**30 else f'{peak / 2**30:.1f} GiB'}"
