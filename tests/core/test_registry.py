"""Classes by name."""

from __future__ import annotations

import pytest

from kinetoscope.core.errors import ConfigError
from kinetoscope.core.registry import Registry


def test_found_when_asked_for_and_refused_in_words() -> None:
    places = {"good": "kinetoscope.core.registry:Registry", "gone": "no.such.module:X", "bad": "json:Nothing"}
    registry = Registry("no {name}; there are {known}", places)
    assert registry.find("good") is Registry
    with pytest.raises(ConfigError, match="no better; there are bad, gone, good"):
        registry.find("better")
    for name in ("gone", "bad"):
        with pytest.raises(ConfigError, match=f"{name} was registered as .*which cannot be imported"):
            registry.find(name)
