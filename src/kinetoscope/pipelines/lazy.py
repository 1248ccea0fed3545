"""Modules that load when they are first used."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar, cast

T = TypeVar("T")


class Lazy(Generic[T]):
    """A value made on first use and kept; threads that ask at the same time get one value.

    Args:
        make: makes the value; called at most once unless it raises.
        before_use: called each time somebody asks for the value, after it was made (it may be away and has to come).
    """

    def __init__(self, make: Callable[[], T], before_use: Callable[[], None] | None = None) -> None:
        self._make = make
        self._before_use = before_use
        self._value: T | None = None
        self._making = threading.RLock()

    @property
    def loaded(self) -> bool:
        """Whether the value has been made."""
        return self._value is not None

    def get(self) -> T:
        """The value, ready for use."""
        value = self.peek()
        if self._before_use:
            self._before_use()
        return value

    def peek(self) -> T:
        """The value, wherever it is."""
        if self._value is None:
            with self._making:
                if self._value is None:
                    self._value = self._make()
        return self._value


def resolve(value: T | Lazy[T]) -> T:
    """`value` itself, or what it lazily stands for."""
    return cast(Lazy[T], value).get() if isinstance(value, Lazy) else value
