"""Refusing an object of an extension that does not have what its protocol asks for, when it is handed in."""

from __future__ import annotations

import inspect
from typing import Any

from kinetoscope.core.errors import CompositionError, KinetoscopeError


def check_protocol(value: object, protocol: type, role: str, error: type[KinetoscopeError] = CompositionError) -> None:
    """Refuse an object that lacks a member of a protocol, or has a method that cannot be called as the protocol says.

    The protocol's own signatures are the only source: every public method and property that the protocol or one of its
    bases defines is needed, and its positional parameters must be accepted by position, its keyword ones by name.

    Args:
        value: the object that was handed in.
        protocol: a `Protocol`, or a base class whose methods are overridden.
        role: what the object is used as ("stage 'upscale'", "a strategy"); begins the message.
        error: kind of the error.

    Raises:
        KinetoscopeError: of the kind `error`; names the class, the member, and the signature that is wanted.
    """
    kind = value.__name__ if isinstance(value, type) else type(value).__name__
    if isinstance(value, type):
        raise error(f"{role}: the class {kind} was given; give an object of it")
    for name, wanted in _members(protocol).items():
        if inspect.getattr_static(value, name, None) is None and not hasattr(value, name):
            what = f"method {name}{_shown(wanted)}" if callable(wanted) else f"attribute {name}"
            raise error(f"{role}: {kind} has no {what}, which {protocol.__name__} asks for")
        if not callable(wanted):
            continue
        found: Any = getattr(value, name)
        if not callable(found):
            raise error(
                f"{role}: {kind}.{name} is {found!r}; {protocol.__name__} asks for a method {name}{_shown(wanted)}"
            )
        if not _accepts(found, wanted):
            raise error(
                f"{role}: {kind}.{name}{_shown(found, bound=True)} cannot be called as {protocol.__name__} asks: "
                f"{name}{_shown(wanted)}"
            )


def _members(protocol: type) -> dict[str, Any]:
    """Return name -> function, or property, of everything public that a protocol and its bases define."""
    found: dict[str, Any] = {}
    for base in reversed(protocol.__mro__):
        if base is object or base.__module__ in ("typing", "typing_extensions", "abc"):
            continue
        found |= {
            n: v
            for n, v in vars(base).items()
            if not n.startswith("_") and (inspect.isfunction(v) or isinstance(v, property))
        }
    return found


def _parameters(function: Any, bound: bool) -> list[inspect.Parameter]:
    """Return the parameters that a caller gives, without `self`."""
    parameters = list(inspect.signature(function).parameters.values())
    return parameters if bound else parameters[1:]


def _shown(function: Any, bound: bool = False) -> str:
    """Return the names of a method's parameters in parentheses, optional ones with an equals sign."""
    try:
        parameters = _parameters(function, bound)
    except (TypeError, ValueError):
        return "(...)"
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    optional = inspect.Parameter.empty
    names = [stars.get(p.kind, "") + p.name + ("" if p.default is optional else "=...") for p in parameters]
    return f"({', '.join(names)})"


def _accepts(found: Any, wanted: Any) -> bool:
    """Return whether `found` can be called with the arguments of `wanted`, with and without its optional ones."""
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):  # written in C: nothing is known of it
        return True
    kind = inspect.Parameter
    given = [p for p in _parameters(wanted, bound=False) if p.kind not in (kind.VAR_POSITIONAL, kind.VAR_KEYWORD)]
    for chosen in (given, [p for p in given if p.default is kind.empty]):
        positional = [None for p in chosen if p.kind is not kind.KEYWORD_ONLY]
        named = {p.name: None for p in chosen if p.kind is kind.KEYWORD_ONLY}
        try:
            signature.bind(*positional, **named)
        except TypeError:
            return False
    return True
