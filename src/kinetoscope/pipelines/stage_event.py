"""The events of a pipeline's stages."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StageEvent:
    """A stage of a pipeline began, or ended after `seconds`.

    Attributes:
        kind: "stage_start" or "stage_end".
        stage: its name.
        seconds: that it took for all of `videos`, at its end.
        videos: which videos of the request it works on, by index.
    """

    kind: str
    stage: str
    seconds: float | None = None
    videos: tuple[int, ...] = ()
