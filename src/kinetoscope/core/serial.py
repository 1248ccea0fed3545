"""Locks that belong to objects which several threads share.

The modules of other packages keep state while they compute: diffusers' Wan VAE the features of earlier frames, a
transformers model the hooks that collect hidden states, a tokenizer its padding. Two generators may share such an
object, and one generator may serve two threads. So its methods are run for one thread at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import wraps
from types import MethodType
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

from torch import nn

T = TypeVar("T")

_MODULE_METHODS = ("forward", "encode", "decode")
_TOKENIZER_METHODS = ("__call__", "apply_chat_template")
_LOCKS: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()
_MARK = "_kinetoscope_serial"


def lock_of(thing: Any) -> threading.RLock:
    """Return the lock of an object: always the same one while the object lives."""
    with _LOCKS_LOCK:
        lock = _LOCKS.get(thing)
        if lock is None:
            lock = _LOCKS[thing] = threading.RLock()
        return lock


def serialize_calls(component: T) -> T:
    """Let only one thread at a time be inside a component; returns the component. A second call changes nothing.

    Args:
        component: a module, whose `forward`, `encode` and `decode` and the forwards of whose direct parts take turns;
            or a tokenizer, whose calls do.
    """
    if isinstance(component, nn.Module):
        for owner, method in _entrances(component):
            if not hasattr(owner.__dict__.get(method), _MARK):
                setattr(owner, method, MethodType(_locked(_function_of(owner, method), component), owner))
    elif callable(component) and hasattr(component, "apply_chat_template"):
        _serialize_tokenizer(component)
    return component


def _entrances(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield (module, method): the ways by which a stage enters a component."""
    for method in _MODULE_METHODS:
        if hasattr(type(module), method):
            yield module, method
    for part in module.children():
        if not isinstance(part, nn.ModuleList):
            yield part, "forward"


def _function_of(owner: nn.Module, method: str) -> Callable[..., Any]:
    """Return a method as a function of (owner, ...), so that a deep copy of the owner calls its own."""
    own = owner.__dict__.get(method)
    if own is None:
        return getattr(type(owner), method)
    if isinstance(own, MethodType) and own.__self__ is owner:
        return own.__func__

    def call(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    return call


def _locked(function: Callable[..., Any], component: nn.Module) -> Callable[..., Any]:
    lock = lock_of(component)

    @wraps(function)
    def call(owner: Any, *args: Any, **kwargs: Any) -> Any:
        with lock:
            return function(owner, *args, **kwargs)

    setattr(call, _MARK, True)
    return call


def _serialize_tokenizer(tokenizer: Any) -> None:
    """Give the tokenizer a class of the same name whose calls take turns: Python looks `__call__` up in the class."""
    kind = cast(Any, type(tokenizer))
    if hasattr(kind, _MARK):
        return

    def turn(name: str) -> Callable[..., Any]:
        function = getattr(kind, name)

        @wraps(function)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            with lock_of(self):
                return function(self, *args, **kwargs)

        return call

    body: dict[str, Any] = {name: turn(name) for name in _TOKENIZER_METHODS}
    tokenizer.__class__ = type(kind.__name__, (kind,), {**body, _MARK: True, "__module__": kind.__module__})
