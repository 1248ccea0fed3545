"""The one notation in which an option with parameters is written: `name:key=value,key=value`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from kinetoscope.core.errors import InputError


def parse_spec(text: str, what: str) -> tuple[str, dict[str, str]]:
    """("name", {"key": "value"}) of "name:key=value,key=value"; values are left as text.

    Args:
        text: the option as written.
        what: what it sets, for messages.

    Raises:
        InputError: an empty name or key, a part that is not key=value, or a key given twice.
    """
    name, _, rest = text.strip().partition(":")
    values: dict[str, str] = {}
    for part in rest.split(",") if rest.strip() else []:
        key, equals, value = (p.strip() for p in part.partition("="))
        if not equals or not key or not value:
            raise InputError(f"{what}={text!r}: {part.strip()!r} is not of the form key=value")
        if key in values:
            raise InputError(f"{what}={text!r}: {key} is given twice")
        values[key] = value
    if not name.strip():
        raise InputError(f"{what}={text!r} names nothing; write name or name:key=value,...")
    return name.strip(), values


def one_of(value: str, known: Iterable[str], what: str) -> str:
    """`value`, which is one of `known`.

    Raises:
        InputError: it is not; the message names the nearest.
    """
    names = list(known)
    if value in names:
        return value
    near = difflib.get_close_matches(value, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise InputError(f"unknown {what} {value!r}{hint} Known: {', '.join(names)}")


def number(values: dict[str, str], key: str, what: str) -> float | None:
    """The number under `key`, or None where it is not given.

    Raises:
        InputError: it is not a number.
    """
    if key not in values:
        return None
    try:
        return float(values[key])
    except ValueError as error:
        raise InputError(f"{what}: {key}={values[key]} is not a number") from error
