"""Settings that a run would not read: one declaration a pipeline, from which requests are refused by name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kinetoscope.core.errors import InputError
from kinetoscope.core.types import SamplingParams

logger = logging.getLogger("kinetoscope")

NEUTRAL: Mapping[str, Any] = {
    "guidance_scale": 1.0,
    "guidance_scale_2": 1.0,
    "guidance_rescale": 0.0,
    "negative_prompt": "",
    "true_cfg_scale": 1.0,
}
"""Setting -> the value that asks for nothing."""


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """What a declaration may look at.

    Attributes:
        pipeline: the `ComposedPipeline` that would make the video.
        params: the request's parameters over the model's defaults.
        inputs: what the request brings beside its prompt: "image", "last_image", "video".
    """

    pipeline: Any
    params: SamplingParams
    inputs: frozenset[str]

    @property
    def one_row(self) -> bool:
        """Whether a step evaluates the prompt alone, without an unconditional row."""
        return self.pipeline.rows(self.params) == 1

    def extra(self, name: str) -> Any:
        """Return a parameter of the model's family."""
        return (self.params.extra or {}).get(name)


@dataclass(frozen=True, slots=True)
class Unread:
    """Settings that some runs of a pipeline do not read.

    Attributes:
        names: fields of `SamplingParams`, or parameters of the family.
        why: what is missing and what to do: the end of the error.
        when: whether a run does not read them.
        refused: whether they are refused; else a warning says that they are not read.
    """

    names: tuple[str, ...]
    why: str
    when: Callable[[PlannedRun], bool]
    refused: bool = True


UNGUIDED = Unread(
    ("guidance_scale", "guidance_scale_2"),
    "guidance is distilled into this model, or it never learned any; leave it out, or use 1",
    lambda run: not run.pipeline.guided,
)
ONE_ROW = Unread(
    ("guidance", "guidance_rescale"),
    "needs an unconditional row, and this run has none; set guidance_scale above 1, if the model is not distilled",
    lambda run: run.one_row,
)
NO_NEGATIVE = Unread(
    ("negative_prompt",),
    "is read by an unconditional row, and this run has none: it changes nothing",
    lambda run: run.one_row,
    refused=False,  # scripts give the same one at every guidance scale, as they do to diffusers
)


def check_read(
    declared: tuple[Unread, ...], run: PlannedRun, given: Mapping[str, Any], usual: Mapping[str, Any]
) -> None:
    """Refuse settings that the request gives and its run would not read; some are only said.

    A value that asks for nothing, or is the model's own default, is taken: it changes nothing and says so.

    Args:
        declared: of the pipeline.
        run: the run as it was planned.
        given: setting -> value of the request; None where the request leaves it out.
        usual: setting -> default.

    Raises:
        InputError: names the setting and the reason.
    """
    for unread in declared:
        for name in unread.names:
            values = given[name] if isinstance(given.get(name), (list, tuple)) else [given.get(name)]
            asked = [v for v in values if v is not None and v not in (NEUTRAL.get(name), usual.get(name))]
            if not asked or not unread.when(run):
                continue
            if unread.refused:
                raise InputError(f"{name}={asked[0]!r}: {unread.why}")
            logger.warning("%s=%r: %s", name, asked[0], unread.why)
