"""Settings of an attention kind in words: "vsa:tile=4,4,4,sparsity=0.8"."""

from __future__ import annotations

import math

from kinetoscope.core.errors import ConfigError


class Parameters:
    """The parameters after the colon, read one by one; `finish` refuses those that nobody read.

    Args:
        spec: "KIND" or "KIND:NAME=VALUE,NAME=VALUE", where a value may itself be numbers with commas between them.

    Raises:
        ConfigError: a part is not NAME=VALUE, or a name stands twice.
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.given: dict[str, str] = {}
        self.read: list[str] = []
        name = None
        for part in spec.partition(":")[2].split(",") if ":" in spec else ():
            key, equals, value = (p.strip() for p in part.partition("="))
            if equals:
                name = key
                if not key or key in self.given:
                    raise self.error(f"{part.strip()!r} should be NAME=VALUE, each name once")
                self.given[key] = value
            elif name is None:
                raise self.error(f"{part.strip()!r} should be NAME=VALUE")
            else:
                self.given[name] += "," + part.strip()

    def error(self, why: str) -> ConfigError:
        """What is wrong with the settings."""
        return ConfigError(f"attention {self.spec!r}: {why}")

    def has(self, name: str) -> bool:
        """Whether a parameter was given."""
        return name in self.given

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A number in [low, high]."""
        text = self._take(name)
        if text is None:
            return default
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise self.error(f"{name}={text} should be a number in [{low:g}, {high:g}]")
        return value

    def whole(self, name: str, default: int, low: int) -> int:
        """A whole number, at least `low`."""
        return self.sizes(name, (default,), low)[0]

    def sizes(self, name: str, default: tuple[int, ...], low: int = 1) -> tuple[int, ...]:
        """As many whole numbers as `default` has, each at least `low`."""
        text = self._take(name)
        if text is None:
            return default
        try:
            values = tuple(int(part) for part in text.split(","))
        except ValueError:
            values = ()
        if len(values) != len(default) or min(values) < low:
            count = "a whole number" if len(default) == 1 else f"{len(default)} whole numbers with commas between them"
            raise self.error(f"{name}={text} should be {count}, at least {low}")
        return values

    def choice(self, name: str, options: tuple[str, ...]) -> str:
        """One of `options`; the first where it is not given."""
        text = self._take(name)
        if text is None:
            return options[0]
        if text not in options:
            raise self.error(f"{name}={text} should be one of {', '.join(options)}")
        return text

    def finish(self) -> None:
        """Raise ConfigError if a parameter was given that the kind does not have."""
        if unknown := sorted(set(self.given) - set(self.read)):
            raise self.error(f"unknown parameters {unknown}; known are {', '.join(dict.fromkeys(self.read))}")

    def _take(self, name: str) -> str | None:
        self.read.append(name)
        return self.given.get(name)
