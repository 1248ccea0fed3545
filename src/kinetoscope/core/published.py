"""Published `config.json` files read into dataclasses, checked field by field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from kinetoscope.core.errors import ConfigError

T = TypeVar("T")


def read_published(cls: type[T], config: Mapping[str, Any], what: str) -> T:
    """`config` as a `cls`, a dataclass whose fields are annotated with int, float, str, bool or tuples of int.

    Fields that begin with an underscore are diffusers' bookkeeping and are skipped. A field annotated
    "tuple[int, int]" takes a list of two integers; " | None" after a kind lets it be null.

    Args:
        cls: the dataclass.
        config: parsed file.
        what: whose configuration it is, for messages.

    Raises:
        ConfigError: unknown field, or a value of the wrong kind.
    """
    known = {f.name: str(f.type) for f in fields(cls)}  # pyright: ignore[reportArgumentType]
    given: dict[str, Any] = {name: value for name, value in config.items() if not name.startswith("_")}
    if unknown := sorted(given.keys() - known.keys()):
        raise ConfigError(f"{what} config has unknown fields {unknown}; known are {sorted(known)}")
    for name, value in given.items():
        kind = known[name]
        if value is None and kind.endswith(" | None"):
            continue
        kind = kind.removesuffix(" | None")
        if value is None or not _fits(kind, value):
            raise ConfigError(f"{what} config: {name}={value!r} should be of type {kind}")
        if kind.startswith("tuple"):
            given[name] = tuple(value)
    return cls(**given)


def require_positive(config: object, what: str) -> None:
    """Refuse a number in a configuration dataclass that is not positive.

    Raises:
        ConfigError: names the field.
    """
    for f in fields(config):  # pyright: ignore[reportArgumentType]
        value = getattr(config, f.name)
        if type(value) in (int, float) and value <= 0:
            raise ConfigError(f"{what} config: {f.name}={value} should be positive")


def _fits(kind: str, value: Any) -> bool:
    if kind.startswith("tuple"):
        values: list[Any] = list(value) if isinstance(value, (list, tuple)) else []  # pyright: ignore
        return len(values) == kind.count("int") and all(type(v) is int and v > 0 for v in values)
    if kind == "float":
        return type(value) in (int, float)
    return type(value).__name__ == kind
