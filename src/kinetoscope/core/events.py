"""Draining a generator of events."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeVar

E = TypeVar("E")
T = TypeVar("T")


def drive(events: Generator[E, None, T], on_event: Callable[[E], None] | None = None) -> T:
    """Run a generator to its end and return its value; it is closed when `on_event` raises or the caller is stopped.

    Args:
        events: the generator. Closing it ends what it runs.
        on_event: called with every event.
    """
    try:
        while True:
            try:
                event = next(events)
            except StopIteration as stop:
                return stop.value
            if on_event is not None:
                on_event(event)
    finally:
        events.close()
