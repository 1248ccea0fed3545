"""Where batches of post-training come from, by the name that a recipe's `data` section gives as `source`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinetoscope.core.registry import Registry
from kinetoscope.train.methods.base import BatchSource
from kinetoscope.train.plugins import Opened
from kinetoscope.train.recipe import Section


class DataSection(Section):
    """Base of the settings of sources.

    Attributes:
        source: its name (`SOURCES`).
    """

    source: str

    @property
    def prompts_only(self) -> bool:
        """Return whether batches bring prompts, and zeros in place of latents."""
        return False


@dataclass(frozen=True, slots=True)
class SourceContext:
    """What a source is made with.

    Attributes:
        opened: the student's model directory: its encoders make latents and text states.
        folder: of the run.
        on_count: called with (done, total) of lengthy preparations.
    """

    opened: Opened
    folder: Path
    on_count: Callable[[int, int], None] | None = None


SOURCES = Registry(
    "unknown data source {name!r}; the known ones are: {known}",
    {
        "latents": "kinetoscope.train.data.latents:LatentSource",
        "ode_pairs": "kinetoscope.train.data.ode_pairs:OdePairs",
        "played": "kinetoscope.train.data.played:PlayedSource",
        "world": "kinetoscope.train.data.worlds:WorldSource",
    },
)
"""The class has `settings_class` and is made of (settings, context)."""


def register_source(name: str, place: str) -> None:
    """Let recipes name the source at `place`, "module:class"."""
    SOURCES[name] = place


def source_class(name: str) -> Any:
    """The class of the source called `name`.

    Raises:
        ConfigError: there is none.
    """
    return SOURCES.find(name)


def make_source(section: DataSection, context: SourceContext) -> BatchSource:
    """The source of a recipe's `data` section."""
    return source_class(section.source)(section, context)
