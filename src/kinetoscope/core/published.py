"""Published `config.json` files read into dataclasses, checked field by field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, TypeVar, cast

from kinetoscope.core.errors import ConfigError

T = TypeVar("T")
C = TypeVar("C", bound="PublishedConfig")


class PublishedConfig:
    """Base of the dataclasses that published configuration files are read into.

    Attributes:
        what: whose configuration it is, for messages.
    """

    __slots__ = ()
    what: ClassVar[str]

    @classmethod
    def from_dict(cls: type[C], config: Mapping[str, Any]) -> C:
        """Read a parsed `config.json`; fields that begin with an underscore are diffusers' bookkeeping and are skipped.

        Raises:
            ConfigError: unknown field, value of the wrong kind, or a variant that is not built.
        """
        result = read_published(cls, config, cls.what)
        result.check()
        return result

    def check(self) -> None:
        """Raise ConfigError where the values do not describe a model that the family's transformer builds."""
        require_positive(self, self.what)

    def require(self, **only: Any) -> None:
        """Raise ConfigError where a field has another than the one value that exists."""
        for name, value in only.items():
            if getattr(self, name) != value:
                raise self.error(f"{name}={getattr(self, name)!r}; only {value!r} exists")

    @classmethod
    def error(cls, problem: str) -> ConfigError:
        """An error that says whose configuration has the problem."""
        return ConfigError(f"{cls.what} config: {problem}")


class HeadedConfig(PublishedConfig):
    """A configuration that gives its width as heads of so many channels."""

    __slots__ = ()
    num_attention_heads: int
    attention_head_dim: int

    @property
    def dim(self) -> int:
        """Width d of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    def check_rope_pairs(self, least: int) -> None:
        """Raise ConfigError unless a head is split into three rotary axes of whole pairs, `least` channels in all."""
        if self.attention_head_dim % 2 or self.attention_head_dim < least:
            raise self.error(
                f"attention_head_dim={self.attention_head_dim} should be even and at least {least} "
                f"(three rotary axes of {least // 6} or more pairs)"
            )

    def check_rope_axes(self, axes: tuple[int, ...]) -> None:
        """Raise ConfigError unless the rotary axes are whole pairs and fill a head."""
        if sum(axes) != self.attention_head_dim or any(d % 2 for d in axes):
            raise self.error(
                f"rope_axes_dim={axes} should be even and add up to attention_head_dim={self.attention_head_dim}"
            )


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
        values = list(cast(Sequence[Any], value)) if isinstance(value, (list, tuple)) else []
        return len(values) == kind.count("int") and all(type(v) is int and v > 0 for v in values)
    if kind == "float":
        return type(value) in (int, float)
    return type(value).__name__ == kind
