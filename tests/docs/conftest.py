"""What documents register is forgotten after each test file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kinetoscope.attention import BACKENDS
from kinetoscope.loading import components
from kinetoscope.pipelines.presets import PIPELINES


@pytest.fixture(scope="module", autouse=True)
def registries() -> Iterator[None]:
    """Backends, pipelines and loaders as they were."""
    known: list[dict[str, Any]] = [BACKENDS, PIPELINES, components._LOADERS]  # pyright: ignore
    before = [dict(registry) for registry in known]
    yield
    for registry, entries in zip(known, before, strict=True):
        registry.clear()
        registry.update(entries)
