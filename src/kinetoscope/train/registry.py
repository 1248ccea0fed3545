"""What recipes name: classes that are imported when they are asked for, so that a recipe imports only what it uses."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from kinetoscope.core.errors import ConfigError
from kinetoscope.core.spec import nearest


class Registry(dict[str, str]):
    """Name -> where a class is, "module:class".

    Args:
        refusal: of an unknown `{name}`, beside those that are `{known}`.
        places: to begin with.
    """

    def __init__(self, refusal: str, places: Mapping[str, str]) -> None:
        super().__init__(places)
        self._refusal = refusal

    def find(self, name: str) -> Any:
        """The class.

        Raises:
            ConfigError: the name is unknown, or its place holds no such class.
        """
        if name not in self:
            near = nearest(name, self)
            hint = f"; did you mean {near}?" if near else ""
            raise ConfigError(self._refusal.format(name=name, known=", ".join(sorted(self))) + hint)
        module, _, found = self[name].partition(":")
        try:
            return getattr(import_module(module), found)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"{name} was registered as {self[name]!r}, which cannot be imported: {error}") from error
