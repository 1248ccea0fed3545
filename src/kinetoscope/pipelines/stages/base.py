"""A stage: one step of the path from a request to frames."""

from __future__ import annotations

from collections.abc import Generator
from typing import ClassVar

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
