"""Every error a user can cause or meet.

A message says what was wrong, where, and what to do. The command line prints it as one line without a traceback.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlong = 40


def shown(value: object) -> str:
    """Return a value as an error message shows it: its `repr`, cut where it is long."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python writes no whole number of more than 4300 digits
        return f"a whole number of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"


class KinetoscopeError(Exception):
    """Base of all errors raised on purpose. `str(error)` is one line, fit to show to a user."""


class InputError(KinetoscopeError):
    """A request field (prompt, size, frames, seed, ...) is out of range or of the wrong kind."""


class ConfigError(KinetoscopeError):
    """A setting, recipe or option has an unknown name or a value of the wrong kind."""


class ModelLoadError(KinetoscopeError):
    """A model directory, component, configuration or weight file is missing or does not fit."""


class OutputError(KinetoscopeError):
    """A result could not be written where it was asked for."""


class CompositionError(KinetoscopeError):
    """Two options, hooks or parts that cannot work together were asked for; the message names both."""


class RunCancelled(KinetoscopeError):
    """A run was cancelled before its last step."""


class BatchError(KinetoscopeError):
    """Some videos of a list of prompts could not be made or written; the others are in `results`, their files written.

    Attributes:
        results: one entry a prompt, in order: its `GenerationResult`, or None. A video whose file alone could not be
            written is here, and its error is in `errors`.
        errors: index of a prompt -> what went wrong with it.
    """

    def __init__(
        self, message: str, results: Sequence[Any] = (), errors: Mapping[int, Exception] | None = None
    ) -> None:
        super().__init__(message)
        self.results = list(results)
        self.errors = dict(errors or {})


class WorkerError(KinetoscopeError):
    """A process of a layout died, stalled, ran out of memory or failed while it worked on a request.

    Attributes:
        rank: of the process in its layout.
        stage: what it was doing: "starting", "idle", or a stage of the pipeline.
        cause: "died", "stalled", "memory" or "failed".
    """

    def __init__(self, message: str, rank: int = 0, stage: str = "", cause: str = "failed") -> None:
        super().__init__(message)
        self.rank = rank
        self.stage = stage
        self.cause = cause
