"""What a pipeline asks of the object that sets its components up."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from kinetoscope.loading.components import Place


class ComponentCare(Protocol):
    """What is done to components between loading and use: quantized, placed, compiled (`runtime.care`)."""

    def home(self, name: str) -> torch.device:
        """Where a component's weights are read to."""
        ...

    def place(self, name: str) -> Place | None:
        """What shares a component out among devices before its weights are read; None: this one has all of it."""
        ...

    def loaded(self, name: str, module: Any) -> None:
        """Called after each load, before first use."""
        ...

    def need(self, name: str) -> None:
        """Called each time a stage asks for a component."""
        ...

    def stage_ended(self) -> None:
        """Called when a stage of a run is done."""
        ...
