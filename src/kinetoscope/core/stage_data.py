"""Objects that a stage leaves in a batch for later stages, strategies and hooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

from typing_extensions import Self

from kinetoscope.core.errors import CompositionError

T = TypeVar("T")


@runtime_checkable
class RowData(Protocol):
    """An object that holds a part for each sample of a batch."""

    def rows(self, start: int, stop: int) -> Self:
        """Return the part of the samples [start, stop)."""
        ...

    def joined(self, others: Sequence[Self]) -> Self:
        """Return one object of the samples of this one, then of `others` in order."""
        ...


class StageData:
    """At most one object of each type: `batch.data.put(Depth(maps))`, later `batch.data.get(Depth)`.

    An object with the methods of `RowData` is split and joined with the samples of its batch. Any other object is
    shared by all samples: a batch that is split passes the same object to every part, and of joined batches the first
    one's object stays.
    """

    def __init__(self) -> None:
        self._objects: dict[type, Any] = {}

    def put(self, value: object) -> None:
        """Keep `value` under its type, in place of an earlier object of the same type."""
        self._objects[type(value)] = value

    def get(self, kind: type[T]) -> T:
        """Return the object of type `kind`, or the only one of a subclass.

        Raises:
            CompositionError: no stage has put one.
        """
        found = self.find(kind)
        if found is None:
            held = ", ".join(k.__name__ for k in self._objects) or "nothing"
            raise CompositionError(f"batch.data holds no {kind.__name__}, but {held}; add the stage that puts it first")
        return found

    def find(self, kind: type[T]) -> T | None:
        """Return the object of type `kind`, or the only one of a subclass; None if no stage has put one."""
        if kind in self._objects:
            return cast(T, self._objects[kind])
        fitting = [value for value in self._objects.values() if isinstance(value, kind)]
        return fitting[0] if len(fitting) == 1 else None

    def __contains__(self, kind: type) -> bool:
        return self.find(kind) is not None

    def __len__(self) -> int:
        return len(self._objects)

    def copy(self) -> StageData:
        """Return another holder of the same objects."""
        return self._of(list(self._objects.values()))

    def samples(self, size: int) -> list[StageData]:
        """Return the data of each of `size` samples."""
        return [
            self._of([v.rows(i, i + 1) if isinstance(v, RowData) else v for v in self._objects.values()])
            for i in range(size)
        ]

    @classmethod
    def joined(cls, parts: Sequence[StageData]) -> StageData:
        """Return the data of the samples of all parts, in order: types that the first part holds."""
        first = parts[0]
        if len(parts) == 1:
            return first
        values: list[Any] = []
        for kind, value in first._objects.items():
            others = [p._objects[kind] for p in parts[1:] if kind in p._objects]
            values.append(value.joined(others) if isinstance(value, RowData) else value)
        return cls._of(values)

    @classmethod
    def _of(cls, values: Sequence[Any]) -> StageData:
        made = cls()
        for value in values:
            made.put(value)
        return made
