"""The processes of one replica: started together, watched together, and ended together when one of them fails."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from kinetoscope.core.errors import ConfigError, KinetoscopeError, RunCancelled, WorkerError
from kinetoscope.parallel import ParallelConfig
from kinetoscope.runtime.executors.base import ExecutorSpec, Health
from kinetoscope.runtime.executors.orders import (
    OPENING,
    Beat,
    Cancel,
    Cancelled,
    Died,
    Done,
    Failed,
    Happened,
    Order,
    Ready,
    Said,
    Status,
    Stop,
    Told,
)

logger = logging.getLogger("kinetoscope.executors")

LOOK = 0.2
"""Seconds between two looks at who is silent."""
GRACE = 2.0
"""Seconds that the other ranks have to tell their side after one failed: the root is found among all of them."""
STOPPING = 5.0
"""Seconds that idle processes have to end by themselves."""


class Link(Protocol):
    """The way to one process. What it says goes to the inbox of its gang as (rank, message); `Died` is the last of it.

    Attributes:
        pid: on this machine, else None.
    """

    pid: int | None

    def send(self, message: Told) -> None:
        """Raises OSError: the process is gone."""
        ...

    def kill(self) -> None:
        """End the process at once, also a stopped one, and wait until it is gone."""
        ...

    def wait(self, seconds: float) -> bool:
        """Whether the process ends by itself within so many seconds."""
        ...


Inbox = queue.Queue[tuple[int, Said]]
OpenLinks = Callable[[Inbox], Sequence[Link]]


@dataclass(slots=True, eq=False)
class Ticket:
    """Something to do, and where its outcome is told: ("event", e), ("done", value) or ("failed", error).

    Attributes:
        kind: method of a worker.
        payload: what it gets.
        box: gets (ticket, message).
        gang: the one that must do it; None: any.
    """

    kind: str
    payload: Any
    box: queue.Queue[tuple[Ticket, tuple[Any, ...]]]
    gang: int | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)

    def tell(self, *message: Any) -> None:
        """Tell the caller something."""
        self.box.put((self, message))


@dataclass(slots=True)
class _Rank:
    """What is known of one process."""

    status: Status
    heard: float
    moved: float
    gone: str | None = None


class Gang:
    """One replica. Its methods are called by the thread that serves it, `health` by any.

    Args:
        index: of the replica.
        config: its layout.
        spec: times after which it is given up.
        open_links: starts the processes.
    """

    def __init__(self, index: int, config: ParallelConfig, spec: ExecutorSpec, open_links: OpenLinks) -> None:
        self.index = index
        self.config = config
        self.spec = spec
        self.starts = 0
        self._open_links = open_links
        self._inbox: Inbox = queue.Queue()
        self._links: Sequence[Link] = ()
        self._ranks: list[_Rank] = []
        self._number = 0
        self._lock = threading.Lock()
        self._closed = False

    # -- life ---------------------------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether all processes are there, as far as is known."""
        self._listen()
        return bool(self._links) and all(r.gone is None for r in self._ranks)

    def start(self) -> None:
        """Start the processes, and wait until their models are open.

        Raises:
            WorkerError: one of them cannot.
            KinetoscopeError: all refuse alike.
        """
        self.kill()
        now = time.monotonic()
        self._inbox = queue.Queue()
        with self._lock:
            if self._closed:
                raise ConfigError("this generator's executor is closed; open the model again")
            self._ranks = [_Rank(Status(), now, now) for _ in range(self.config.world)]
            self._links = self._open_links(self._inbox)
        self.starts += 1
        try:
            self._until(OPENING, None, self.spec.start)
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """Let idle processes end, and kill those that do not."""
        for link in self._links:
            try:
                link.send(Stop())
            except OSError:
                continue
        until = time.monotonic() + STOPPING
        for link in self._links:
            link.wait(max(0.0, until - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """End all processes."""
        with self._lock:
            links, self._links = self._links, ()
        for link in links:
            link.kill()

    def close(self) -> None:
        """End all processes, for good; any thread may call it."""
        with self._lock:
            self._closed = True
        self.kill()

    def health(self) -> list[Health]:
        """Of each process."""
        now = time.monotonic()
        with self._lock:
            known = list(zip(self._links, self._ranks, strict=False))
        return [
            Health(self.index, i, link.pid, rank.gone is None and now - rank.heard < self.spec.stall,
                   rank.status.stage, rank.status.step, now - rank.heard)
            for i, (link, rank) in enumerate(known)
        ]  # fmt: skip

    # -- orders -------------------------------------------------------------------------------------------------------

    def do(self, ticket: Ticket) -> Any:
        """Have all processes do something; the value of the first.

        Raises:
            RunCancelled: it was cancelled meanwhile.
            WorkerError: a process died, stalled, ran out of memory or failed; all are gone now.
            KinetoscopeError: all refuse alike, and are ready for the next.
        """
        self._number += 1
        self._listen()
        now = time.monotonic()
        for rank in self._ranks:
            rank.heard = rank.moved = now
            rank.status = Status("idle", 0, rank.status.count)
        try:
            for i, link in enumerate(self._links):
                try:
                    link.send(Order(self._number, ticket.kind, ticket.payload))
                except OSError:
                    self._ranks[i].gone = self._ranks[i].gone or "died"
            return self._until(self._number, ticket, self.spec.timeout)
        except WorkerError:
            self.kill()
            raise

    def _until(self, number: int, ticket: Ticket | None, timeout: float) -> Any:
        """Listen until all ranks have answered the order `number`, or have opened the model."""
        waiting = set(range(self.config.world))
        failures: dict[int, Failed] = {}
        value: Any = None
        told = cancelled = False
        decide: float | None = None
        silent: set[int] = set()
        while waiting:
            try:
                rank, said = self._inbox.get(timeout=LOOK)
            except queue.Empty:
                rank, said = -1, None
            else:
                self._hear(rank, said)
            match said:
                case Happened(of, event) if of == number and ticket is not None:
                    ticket.tell("event", event)
                case Ready() if number == OPENING:
                    waiting.discard(rank)
                case Done(of, own) if of == number:
                    waiting.discard(rank)
                    value = own if rank == 0 else value
                case Cancelled(of) if of == number:
                    waiting.discard(rank)
                    cancelled = True
                case Failed(of) if of == number:
                    waiting.discard(rank)
                    failures[rank] = said
                case _:
                    pass  # a sign of life, or the answer to an order before this
            if ticket is not None and ticket.cancelled.is_set() and not told:
                told = True
                self._send(0, Cancel(number))
            now = time.monotonic()
            if decide is None and (failures or any(r.gone for r in self._ranks)):
                decide = now + GRACE
            if decide is not None and (now >= decide or self._rest_gone(waiting)):
                break
            if rank < 0:
                silent = self._check(now, timeout, silent, number)
        if failures or waiting:
            raise self._error(failures, number)
        if cancelled:
            raise RunCancelled("the request was cancelled")
        return value

    # -- watching -----------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        """Take in what has been said while nothing was asked."""
        while True:
            try:
                self._hear(*self._inbox.get_nowait())
            except queue.Empty:
                return

    def _hear(self, rank: int, said: Said) -> None:
        known = self._ranks[rank]
        known.heard = time.monotonic()
        status = known.status
        match said:
            case Died(how):
                known.gone = how
            case Happened(_, event):  # fresher than the signs of life
                status = status.after(event)
            case Beat(own) | Failed(status=own):
                status = own
            case _:
                pass
        if status != known.status:
            known.moved = known.heard
        known.status = status

    def _rest_gone(self, waiting: set[int]) -> bool:
        return all(self._ranks[i].gone for i in waiting)

    def _send(self, rank: int, message: Told) -> None:
        try:
            self._links[rank].send(message)
        except OSError:
            self._ranks[rank].gone = self._ranks[rank].gone or "died"

    def _check(self, now: float, timeout: float, before: set[int], number: int) -> set[int]:
        """Who is silent; those who were so at the last look too have stopped.

        Raises:
            WorkerError: a rank stopped, or none has moved for too long.
        """
        silent = {i for i, r in enumerate(self._ranks) if r.gone is None and now - r.heard > self._patience(number)}
        if both := silent & before:
            rank = min(both)
            seconds = now - self._ranks[rank].heard
            raise self._worker_error(rank, "stalled", f"gave no sign of life for {seconds:.0f} s (stopped, or stuck)")
        if self._ranks and now - max(r.moved for r in self._ranks) > timeout:
            rank = min(range(len(self._ranks)), key=lambda i: self._ranks[i].status.count)
            raise self._worker_error(
                rank, "stalled", f"made no progress for {timeout:.0f} s, and the others wait for it"
                if len(self._ranks) > 1 else f"made no progress for {timeout:.0f} s",
            )  # fmt: skip
        return silent

    def _patience(self, number: int) -> float:
        """Seconds of silence that are borne; a process that starts is silent while it imports."""
        return self.spec.start if number == OPENING else self.spec.stall

    def _error(self, failures: dict[int, Failed], number: int) -> KinetoscopeError:
        """The root of what went wrong: a death before all, since the others fail when one is gone."""
        gone = {i: r.gone for i, r in enumerate(self._ranks) if r.gone is not None and i not in failures}
        if not gone and len(failures) == self.config.world:
            own = [f.error for f in failures.values()]
            if own[0] is not None and all(type(e) is type(own[0]) for e in own):
                return own[0]
        for rank, how in gone.items():
            return self._worker_error(rank, "died", how)
        ordered = sorted(failures, key=lambda i: (failures[i].cause != "memory", failures[i].error is None, i))
        rank = ordered[0] if ordered else 0
        if not ordered:
            return self._worker_error(rank, "failed", "ended without an answer")
        failed = failures[rank]
        self._ranks[rank].status = failed.status
        how = f"ran out of memory ({failed.text})" if failed.cause == "memory" else f"failed: {failed.text}"
        found = self._worker_error(rank, failed.cause, how)
        found.__cause__ = failed.error
        return found

    def _worker_error(self, rank: int, cause: str, how: str) -> WorkerError:
        status = self._ranks[rank].status
        where = f"in stage {status.stage}" if status.stage not in ("starting", "idle") else f"while {status.stage}"
        if status.step:
            where += f", after {status.step} step{'s' if status.step > 1 else ''}"
        who = f"rank {rank} of {self.config}" if self.config.world > 1 else "the worker"
        if self.index:
            who += f" (replica {self.index})"
        return WorkerError(f"{who} {how} {where}; the processes are started again", rank, status.stage, cause)
