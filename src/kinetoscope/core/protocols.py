"""Refusing an object of an extension that does not have what its protocol asks for, when it is handed in.

The signatures of the protocols are the only source of what is asked for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from kinetoscope.core.errors import CompositionError, KinetoscopeError
from kinetoscope.core.spec import nearest


def check_protocol(value: object, protocol: type, role: str, error: type[KinetoscopeError] = CompositionError) -> None:
    """Refuse an object that lacks a member of a protocol, or has a method that cannot be called as the protocol says.

    Needed is every public method, property and annotated attribute that the protocol or one of its bases defines.
    Positional parameters of a method must be accepted by position, keyword ones by name.

    Args:
        value: the object that was handed in.
        protocol: a `Protocol`, or a base class whose methods are overridden.
        role: what the object is used as ("stage 'upscale'", "strategy"); begins the message.
        error: kind of the error.

    Raises:
        KinetoscopeError: of the kind `error`; names the class, the member, and the signature that is wanted.
    """
    if isinstance(value, type):
        raise error(f"{role}: the class {value.__name__} was given; give an object of it, {value.__name__}(...)")
    _check(value, type(value).__name__, protocol, role, error)


def check_class(kind: type, protocol: type, role: str, error: type[KinetoscopeError] = CompositionError) -> None:
    """Refuse a class whose objects would lack a method of a protocol; see `check_protocol`."""
    _check(kind, kind.__name__, protocol, role, error)


def check_factory(factory: object, protocol: Callable[[type], type], role: str) -> None:
    """Refuse what cannot make objects from one argument: no callable, or a class that lacks a method.

    What a function makes is known only when it is called; a class (or a `partial` of one) is checked now.

    Args:
        factory: a class, a `partial` of one, or a function.
        protocol: class -> what its objects must have.
        role: begins the message.

    Raises:
        CompositionError: names the factory, and the method that is missing.
    """
    name = getattr(factory, "__name__", type(factory).__name__)
    if not callable(factory):
        raise CompositionError(f"{role}: {factory!r} is not callable; give a class, or a function that makes an object")
    made: Any = factory
    while isinstance(made, partial):
        made = made.func  # pyright: ignore[reportUnknownMemberType]
    if isinstance(made, type):
        check_class(made, protocol(made), role)
    try:
        inspect.signature(factory).bind(None)
    except TypeError as why:
        raise CompositionError(f"{role}: {name} is called with one positional argument: {why}") from why
    except ValueError:  # written in C: nothing is known of it
        return


def check_call(function: object, wanted: Any, role: str, error: type[KinetoscopeError] = CompositionError) -> None:
    """Refuse what cannot be called like the function `wanted`.

    Raises:
        KinetoscopeError: of the kind `error`; shows both signatures.
    """
    name = getattr(function, "__name__", type(function).__name__)
    if not callable(function):
        raise error(f"{role}: {function!r} is not callable; give a function {_shown(_parameters(wanted))}")
    if not _accepts(_known(function), _parameters(wanted)):
        raise error(
            f"{role}: {name}{_shown(_known(function))} cannot be called with the arguments "
            f"{_shown(_parameters(wanted))}"
        )


def check_spelling(kind: type, protocol: type, prefix: str, role: str) -> None:
    """Refuse a class with a method that looks like a misspelt one of a protocol, and would never be called.

    Raises:
        CompositionError: names both.
    """
    known = _members(protocol)
    for name, value in vars(kind).items():
        if name.startswith(prefix) and name not in known and inspect.isfunction(value):
            near = nearest(name, known)
            if near is not None:
                raise CompositionError(f"{role}: {kind.__name__}.{name} is never called; did you mean {near}?")


def has_any(value: object, protocol: type, beside: type) -> bool:
    """Return whether `value` has a member of `protocol` that `beside` does not ask for."""
    return any(hasattr(value, name) for name in _members(protocol).keys() - _members(beside).keys())


def _check(value: Any, kind: str, protocol: type, role: str, error: type[KinetoscopeError]) -> None:
    for name, wanted in _members(protocol).items():
        method = inspect.isfunction(wanted)
        shown = _shown(_parameters(wanted)[1:]) if method else ""
        if inspect.getattr_static(value, name, None) is None and not hasattr(value, name):
            if isinstance(value, type) and not method:  # an attribute that the object may set when it is made
                continue
            raise error(f"{role}: {kind} has no {'method' if method else 'attribute'} {name}{shown}, which "
                        f"{protocol.__name__} asks for")  # fmt: skip
        if not method:
            continue
        found = getattr(value, name)
        if not callable(found):
            raise error(f"{role}: {kind}.{name} is {found!r}; {protocol.__name__} asks for a method {name}{shown}")
        parameters = _known(found)
        if parameters and isinstance(value, type) and inspect.isfunction(inspect.getattr_static(value, name)):
            parameters = parameters[1:]
        if not _accepts(parameters, _parameters(wanted)[1:]):
            raise error(
                f"{role}: {kind}.{name}{_shown(parameters)} cannot be called as {protocol.__name__} asks: {name}{shown}"
            )


def _members(protocol: type) -> dict[str, Any]:
    """Return name -> function, property, or None for an attribute: what a protocol and its bases define publicly."""
    found: dict[str, Any] = {}
    for base in reversed(protocol.__mro__):
        if base is object or base.__module__ in ("typing", "typing_extensions", "abc"):
            continue
        found |= {n: None for n in inspect.get_annotations(base) if not n.startswith("_")}
        found |= {
            n: v
            for n, v in vars(base).items()
            if not n.startswith("_") and (inspect.isfunction(v) or isinstance(v, property))
        }
    return found


def _parameters(function: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def _known(function: Any) -> list[inspect.Parameter] | None:
    """Return the parameters of a callable; None for one written in C that does not tell them."""
    try:
        return _parameters(function)
    except (TypeError, ValueError):
        return None


def _shown(parameters: list[inspect.Parameter] | None) -> str:
    """Return the names of parameters in parentheses, optional ones with an equals sign."""
    if parameters is None:
        return "(...)"
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    names = [
        stars.get(p.kind, "") + p.name + ("" if p.default is inspect.Parameter.empty else "=...") for p in parameters
    ]
    return f"({', '.join(names)})"


def _accepts(found: list[inspect.Parameter] | None, wanted: list[inspect.Parameter]) -> bool:
    """Return whether parameters accept the arguments of `wanted`, with and without its optional ones."""
    if found is None:
        return True
    kind = inspect.Parameter
    signature = inspect.Signature(found)
    given = [p for p in wanted if p.kind not in (kind.VAR_POSITIONAL, kind.VAR_KEYWORD)]
    for chosen in (given, [p for p in given if p.default is kind.empty]):
        positional = [None for p in chosen if p.kind is not kind.KEYWORD_ONLY]
        named = {p.name: None for p in chosen if p.kind is kind.KEYWORD_ONLY}
        try:
            signature.bind(*positional, **named)
        except TypeError:
            return False
    return True
