"""Names of extensions: each stands for an object, or for the place from which the object is imported on first use."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from kinetoscope.core.errors import ConfigError
from kinetoscope.core.spec import nearest


class Registry(dict[str, Any]):
    """Name -> an object, or the text "module:attribute" of the place where it is defined.

    Args:
        refusal: message for an unknown `{name}`; it may also hold `{known}`, the names that are known.
        places: the first entries.
    """

    def __init__(self, refusal: str, places: Mapping[str, Any]) -> None:
        super().__init__(places)
        self._refusal = refusal

    def find(self, name: str) -> Any:
        """Return the object called `name`; import it where the entry is a place.

        Raises:
            ConfigError: the name is unknown, or its place cannot be imported or has no such attribute.
        """
        if name not in self:
            near = nearest(name, self)
            hint = f"; did you mean {near}?" if near else ""
            raise ConfigError(self._refusal.format(name=name, known=", ".join(sorted(self))) + hint)
        entry = self[name]
        if not isinstance(entry, str):
            return entry
        module, _, attribute = entry.partition(":")
        try:
            return getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"{name} was registered as {entry!r}, which cannot be imported: {error}") from error


def check_place(what: str, entry: object) -> None:
    """Refuse an entry that is neither callable nor the text "module:attribute".

    Args:
        what: names the parameter in the message.
        entry: to be put into a registry.

    Raises:
        ConfigError: it is neither.
    """
    module, _, attribute = entry.partition(":") if isinstance(entry, str) else ("", "", "")
    if not callable(entry) and not (module and attribute.isidentifier()):
        raise ConfigError(f"{what} is {entry!r}; give a class, a function, or the text 'module:name' of one")
