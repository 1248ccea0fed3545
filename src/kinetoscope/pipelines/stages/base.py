"""A stage: one step of the path from a request to frames."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any, ClassVar

from kinetoscope.core.errors import CompositionError
from kinetoscope.core.protocols import check_protocol
from kinetoscope.core.types import ExecutionArgs, ForwardBatch
from kinetoscope.engine.protocols import Event


class Stage:
    """Takes a batch, fills in its part, hands it on.

    Override `forward`; a stage that has progress to tell overrides `iterate` instead.

    Attributes:
        optional: whether a pipeline whose preset added the stage runs without it (`ComposedPipeline.remove_stage`).
    """

    optional: ClassVar[bool] = False

    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The batch with this stage's part done."""
        raise TypeError(f"{type(self).__name__} overrides neither forward nor iterate")

    def iterate(self, batch: ForwardBatch, args: ExecutionArgs) -> Generator[Event, None, ForwardBatch]:
        """As `forward`, yielding events on the way; the generator's return value is the batch."""
        yield from ()
        return self.forward(batch, args)


class Stages(dict[str, Stage]):
    """Name -> stage, in the order in which they run; what is no stage is refused when it is put in."""

    def __init__(self, stages: Mapping[str, Stage] | None = None) -> None:
        super().__init__()
        for name, stage in (stages or {}).items():
            self[name] = stage

    def __setitem__(self, name: str, stage: Stage) -> None:
        """Put a stage in.

        Raises:
            CompositionError: it lacks a method of `Stage`, or does nothing.
        """
        role = f"stage {name!r}"
        check_protocol(stage, Stage, role)
        kind = type(stage)
        if (kind.forward, kind.iterate) == (Stage.forward, Stage.iterate):
            raise CompositionError(f"{role}: {kind.__name__} overrides neither forward(batch, args) nor iterate")
        super().__setitem__(name, stage)

    def update(self, *stages: Any, **named: Any) -> None:
        """Put several in, as `dict.update`."""
        for name, stage in dict(*stages, **named).items():
            self[name] = stage

    def setdefault(self, name: str, stage: Stage) -> Stage:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Put one in where there is none of its name."""
        if name not in self:
            self[name] = stage
        return self[name]
