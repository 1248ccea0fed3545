"""YAML files of sections, with dotted overrides "section.key=value"."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from kinetoscope.core.errors import ConfigError
from kinetoscope.core.files import read_text


def read_sections(path: str | Path, overrides: Sequence[str] = (), what: str = "configuration") -> dict[str, Any]:
    """Return the sections of a YAML file with overrides, their keys and values not yet checked.

    Args:
        path: the file.
        overrides: "section.key=value" each; values are YAML.
        what: the file is, for messages.

    Raises:
        ConfigError: the file is missing or not YAML, or an override does not fit.
    """
    try:
        data = yaml.safe_load(read_text(path, ConfigError, what))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{what} {path} is not valid YAML: {_problem(error)}") from error
    if data is None:
        raise ConfigError(f"{what} {path} is empty")
    if not isinstance(data, dict):
        raise ConfigError(f"{what} {path} should hold sections; it holds a {type(data).__name__}")
    sections = cast(dict[str, Any], data)
    for text in overrides:
        override(sections, text)
    return sections


def _problem(error: Exception) -> str:
    """Return what is wrong and where, on one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem or error.context}"
    return " ".join(str(error).split())


def override(data: dict[str, Any], text: str) -> None:
    """Set one value of nested sections in place.

    Raises:
        ConfigError: the text is not "section.key=value", or a section is a value.
    """
    key, equals, value = text.partition("=")
    *parents, last = key.strip().split(".")
    if not equals or not last:
        raise ConfigError(f"override {text!r} is not of the form section.key=value")
    for parent in parents:
        inner = data.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"override {text!r}: {parent} is a value, not a section")
        data = cast(dict[str, Any], inner)
    try:
        data[last] = yaml.safe_load(value)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"override {text!r}: the value is not valid YAML") from error
