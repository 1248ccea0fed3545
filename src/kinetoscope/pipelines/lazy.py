"""Modules that load when they are first used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar, cast

T = TypeVar("T")


class Lazy(Generic[T]):
    """A value made on first use and kept.

    Args:
        make: makes the value; called at most once unless it raises.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._value: T | None = None

    @property
    def loaded(self) -> bool:
        """Whether the value has been made."""
        return self._value is not None

    def get(self) -> T:
        """The value."""
        if self._value is None:
            self._value = self._make()
        return self._value


def resolve(value: T | Lazy[T]) -> T:
    """`value` itself, or what it lazily stands for."""
    return cast(Lazy[T], value).get() if isinstance(value, Lazy) else value
