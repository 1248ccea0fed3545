"""A stream whose blocks are made by other processes; used as a `Session`."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Generator, Mapping
from types import TracebackType
from typing import Any

import numpy as np

from kinetoscope.core.errors import InputError, KinetoscopeError
from kinetoscope.core.types import SamplingParams
from kinetoscope.runtime.executors.pool import Pool
from kinetoscope.runtime.running import RunEvent
from kinetoscope.runtime.session import Session

_KEYS = itertools.count()


def drain(
    start: Callable[[], Session | RemoteSession], blocks: int | None
) -> Generator[np.ndarray[Any, Any], None, None]:
    """The blocks of a session, which begins with the first and ends with the generator."""
    with start() as session:
        while blocks is None or session.blocks < blocks:
            yield session.step()


class RemoteSession:
    """See `Session`, whose attributes and methods it has. It stays with the replica that it began on.

    Args:
        pool: of the processes.
        order: what the workers start it with.
        on_event: called with every event, after the block that it is of.
    """

    def __init__(
        self, pool: Pool, order: Mapping[str, Any], on_event: Callable[[RunEvent], None] | None = None
    ) -> None:
        self._pool = pool
        self._key = next(_KEYS)
        self._gang = self._key % len(pool.gangs)
        self._on_event = on_event
        self._closed = True
        self._reported: dict[str, Any] = {}
        self.blocks = self.frames = 0
        self._unclosed = weakref.finalize(self, _end_session, pool, self._order("close"), self._gang)
        self._unclosed.atexit = False  # the processes end then, and their sessions with them
        try:
            made = pool.call("session", {**order, "key": self._key}, self._gang, on_event)
        except BaseException:
            self._unclosed()
            raise
        self._closed = False
        self.params: SamplingParams = made["params"]
        self.seed: int = made["seed"]
        self._next = made["next_frames"]

    @property
    def closed(self) -> bool:
        """Whether no more blocks can be made."""
        return self._closed

    @property
    def logging_info(self) -> dict[str, Any]:
        """A copy of what the hooks of the worker have reported so far; see `Session.logging_info`."""
        if not self._closed:
            self._reported = self._call("logging_info")
        return self._reported

    @property
    def next_frames(self) -> int:
        """Frames that the next block will have."""
        return self._next

    def step(self, **inputs: Any) -> np.ndarray[Any, Any]:
        """The next block, uint8 [T, H, W, 3]; see `Session.step`.

        Raises:
            WorkerError: a process died, stalled or ran out of memory; the session is closed then.
        """
        return self._call("step", **inputs)

    def prompt(self, text: str) -> None:
        """Let the video follow `text` from the next block on."""
        self._call("prompt", text)

    def record(self, digest: str) -> dict[str, Any] | None:
        """What `replay` needs to make the video so far again."""
        return self._call("record", digest)

    def close(self) -> None:
        """End the session. Closing twice is fine."""
        if self._closed:
            return
        self._closed = True
        try:
            self._reported, _, _ = self._pool.call("session_call", self._order("close"), self._gang)
        except KinetoscopeError:
            pass  # it is gone with its processes, or with the executor
        except BaseException:  # of the caller, who does not wait for the answer
            self._unclosed()
            raise
        self._unclosed.detach()

    def __enter__(self) -> RemoteSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _order(self, name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {"key": self._key, "name": name, "args": args, "kwargs": kwargs}

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if self._closed:
            raise InputError(f"this session is closed after {self.blocks} blocks; start a new one")
        try:
            value, state, error = self._pool.call(
                "session_call", self._order(name, *args, **kwargs), self._gang, self._on_event
            )
        except BaseException:  # no answer: the block may be half made, so the worker's session ends too
            self._closed = True
            self._unclosed()
            raise
        self._closed = state["closed"]
        self.blocks, self.frames = state.get("blocks", self.blocks), state.get("frames", self.frames)
        self._next = state.get("next_frames", self._next)
        if self._closed:
            self._unclosed.detach()
        if error is not None:
            raise error
        return value


def _end_session(pool: Pool, order: Mapping[str, Any], gang: int) -> None:
    """Let the worker end a session whose caller is gone; nobody waits for it."""
    with contextlib.suppress(KinetoscopeError):  # the executor is closed, and the session with it
        pool.post("session_call", order, gang)
