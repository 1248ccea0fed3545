"""The videos of a request as they are finished: each prompt gets its result or its error."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from kinetoscope.core.errors import BatchError
from kinetoscope.core.types import SamplingParams

E = TypeVar("E")
SHOWN = 3
"""Prompts that the message of a `BatchError` names."""


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


@dataclass(frozen=True, slots=True, eq=False)
class ResultEvent:
    """A video of a request is finished, or has failed.

    Attributes:
        videos: its index among the videos of the request, alone.
        result: the video; None if it was not made.
        error: why it was not made, or, beside a result, why its file was not written; None: nothing went wrong.
        kind: "result".
    """

    videos: tuple[int]
    result: GenerationResult | None = None
    error: Exception | None = None
    kind: str = "result"

    @property
    def index(self) -> int:
        """Return the index of the video among those of the request."""
        return self.videos[0]


def settled(
    events: Generator[E, None, list[ResultEvent]], prompts: Sequence[str]
) -> Generator[E, None, list[GenerationResult]]:
    """Pass the events of a request on and return its results, in the order of its prompts.

    Raises:
        BatchError: some prompts of several failed, and not all of them alike.
        Exception: what the only prompt failed of, or all prompts alike.
    """
    outcomes = yield from events
    errors = {o.index: o.error for o in outcomes if o.error is not None}
    if not errors:
        return [o.result for o in outcomes if o.result is not None]
    first = next(iter(errors.values()))
    alike = len({(type(e), str(e)) for e in errors.values()}) == 1 and all(o.result is None for o in outcomes)
    if len(outcomes) == 1 or alike:
        raise first
    shown = [f"prompt {i} ({prompts[i]!r:.60}): {_words(e)}" for i, e in list(errors.items())[:SHOWN]]
    more = f"; and {len(errors) - SHOWN} more" if len(errors) > SHOWN else ""
    raise BatchError(
        f"{len(errors)} of {len(outcomes)} prompts failed: {'; '.join(shown)}{more}. The other videos are made",
        [o.result for o in outcomes],
        errors,
    ) from first


def moved(event: Any, first: int) -> Any:
    """Return an event of videos that begin at index `first` of the request."""
    videos: tuple[int, ...] = getattr(event, "videos", ())
    return replace(event, videos=tuple(index + first for index in videos)) if first and videos else event


def _words(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
