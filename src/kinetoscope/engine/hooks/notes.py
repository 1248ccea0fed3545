"""What one hook has to say about a step, for another that writes it down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kinetoscope.engine.protocols import StrategyState

_NOTES = object()


class _Notes(NamedTuple):
    step: object
    by_key: dict[str, list[Any]]


def note(state: StrategyState, key: str, records: Sequence[Any]) -> None:
    """Add `records`, fit for JSON, to what is said of the current step under `key`.

    Nothing is kept beyond the step, so it costs nothing where nobody reads.
    """
    held: _Notes | None = state.scratch.get(_NOTES)
    if held is None or held.step is not state.step:
        held = state.scratch[_NOTES] = _Notes(state.step, {})
    held.by_key.setdefault(key, []).extend(records)


def renote(state: StrategyState, key: str, records: Sequence[Any]) -> None:
    """`note`, in the place of what was said of the current step under `key`."""
    note(state, key, ())
    state.scratch[_NOTES].by_key[key] = list(records)


def notes_of(state: StrategyState) -> Mapping[str, list[Any]]:
    """key -> what was said of the current step."""
    held: _Notes | None = state.scratch.get(_NOTES)
    return held.by_key if held is not None and held.step is state.step else {}
