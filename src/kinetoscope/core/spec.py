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
    raise InputError(unknown(what, value, names))


def nearest(value: object, known: Iterable[str], likeness: float = 0.6) -> str | None:
    """Return the known name that `value` looks like, whatever its case; None if there is none.

    Args:
        likeness: least ratio of `difflib.SequenceMatcher`, in [0, 1].
    """
    names = {name.lower(): name for name in known}
    found = difflib.get_close_matches(str(value).lower(), names, n=1, cutoff=likeness)
    return names[found[0]] if found else None


def unknown(what: str, value: object, known: Iterable[str]) -> str:
    """Return the message about a name that is none of `known`, with the nearest of them."""
    names = list(known)
    near = nearest(value, names)
    hint = f"did you mean {near}? Known" if near else "known"
    return f"unknown {what} {value!r}; {hint}: {', '.join(names) or 'none'}"


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
