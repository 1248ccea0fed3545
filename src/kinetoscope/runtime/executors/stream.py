"""A stream whose blocks are made by other processes; used as a `Session`."""

from __future__ import annotations

import itertools
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
        made = pool.call("session", {**order, "key": self._key}, self._gang, on_event)
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
        if not self._closed:
            self._closed = True
            try:
                self._reported, _ = self._pool.call("session_call", self._order("close"), self._gang)
            except KinetoscopeError:
                return  # it is gone with its processes, or with the executor

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
            value, state = self._pool.call(
                "session_call", self._order(name, *args, **kwargs), self._gang, self._on_event
            )
        except InputError:
            raise  # refused, as by a session that is here: it goes on
        except BaseException:
            self._closed = True
            raise
        self._closed, self.blocks, self.frames = state["closed"], state["blocks"], state["frames"]
        self._next = state.get("next_frames", self._next)
        return value
