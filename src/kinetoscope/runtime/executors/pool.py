"""Requests shared out among replicas, each a gang of processes: what `processes` and `ray` have in common."""

from __future__ import annotations

import logging
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kinetoscope.core.errors import CompositionError, ConfigError, KinetoscopeError, RunCancelled, WorkerError
from kinetoscope.loading import ModelDir
from kinetoscope.parallel import ParallelConfig
from kinetoscope.runtime.executors.base import Health, Job, part_of, replica_shares
from kinetoscope.runtime.executors.gang import Gang, Ticket
from kinetoscope.runtime.preview import load_preview_map
from kinetoscope.runtime.results import ResultEvent, moved
from kinetoscope.runtime.running import RunEvent, write_result

logger = logging.getLogger("kinetoscope.executors")


class Line:
    """Tickets that wait, first come, first served; some for one gang only."""

    def __init__(self) -> None:
        self._waiting: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, ticket: Ticket) -> None:
        """Add a ticket.

        Raises:
            ConfigError: the line is closed.
        """
        with self._changed:
            if self._closed:
                raise ConfigError("this generator's executor is closed; open the model again")
            self._waiting.append(ticket)
            self._changed.notify_all()

    def take(self, gang: int) -> Ticket | None:
        """The next that this gang may do; None when the line is closed."""
        with self._changed:
            while not self._closed:
                for ticket in self._waiting:
                    if ticket.gang in (None, gang):
                        self._waiting.remove(ticket)
                        return ticket
                self._changed.wait()
            return None

    def close(self) -> list[Ticket]:
        """Let nobody wait; the tickets that nobody has taken."""
        with self._changed:
            self._closed = True
            left = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
            return left


class Pool:
    """An executor with processes of its own; a subclass starts them.

    Args:
        name: of the executor.
        config: the layout.
        model: for previews.
        gangs: one a replica, not started.

    Raises:
        WorkerError, KinetoscopeError: the processes cannot start.
    """

    def __init__(self, name: str, config: ParallelConfig, model: ModelDir, gangs: Sequence[Gang]) -> None:
        self.name = name
        self.config = config
        self.announces = True
        self.model = model
        self.gangs = gangs
        self._line = Line()
        self._current: dict[int, Ticket] = {}
        started: queue.Queue[BaseException | None] = queue.Queue()
        self._threads = [
            threading.Thread(target=_serve, args=(g, self._line, self._current, started), daemon=True) for g in gangs
        ]
        self._finalizer = weakref.finalize(self, _close, self._line, self._current, self._threads, gangs)
        for thread in self._threads:
            thread.start()
        for error in [started.get() for _ in gangs]:
            if error is not None:
                self.close()
                raise error

    def run(self, job: Job) -> Generator[RunEvent, None, list[ResultEvent]]:
        """See `Executor.run`.

        Raises:
            CompositionError: hooks of the caller's program, which other processes do not have.
        """
        if len(job.plan.hooks) > job.trace:  # a trace is a hook that workers have too
            raise CompositionError(
                f"hooks= and executor={self.name!r} cannot be used together: the model runs in other processes; use "
                "on_event, or the executor 'in-process'"
            )
        if job.preview is not False:
            load_preview_map(self.model, None if job.preview is True else Path(job.preview))
        return self._run(job)

    def call(self, kind: str, payload: Mapping[str, Any], gang: int, on_event: Any = None) -> Any:
        """Have one gang do something; its value.

        Raises:
            WorkerError, KinetoscopeError: as it fails.
        """
        ticket = self.post(kind, payload, gang)
        try:
            while True:
                _, message = ticket.box.get()
                if message[0] == "event" and on_event:
                    on_event(message[1])
                elif message[0] == "failed":
                    raise message[1]
                elif message[0] == "done":
                    return message[1]
        except BaseException:
            ticket.cancelled.set()
            raise

    def post(self, kind: str, payload: Mapping[str, Any], gang: int) -> Ticket:
        """Have one gang do something, without waiting for it.

        Raises:
            ConfigError: the executor is closed.
        """
        ticket = Ticket(kind, payload, queue.Queue(), gang)
        self._line.put(ticket)
        return ticket

    def health(self) -> list[Health]:
        """See `Executor.health`."""
        return [h for gang in self.gangs for h in gang.health()]

    def close(self) -> None:
        """See `Executor.close`."""
        self._finalizer()

    def _run(self, job: Job) -> Generator[RunEvent, None, list[ResultEvent]]:
        plan = job.plan
        parts = replica_shares(len(plan.prompts), job.size, self.config.replicas)
        box: queue.Queue[tuple[Ticket, tuple[Any, ...]]] = queue.Queue()
        common = {"size": job.size, "trace": job.trace, "preview": job.preview, "lora": list(job.options["lora"])}
        tickets: dict[Ticket, slice] = {}
        outcomes: dict[int, ResultEvent] = {}
        try:
            for part in parts:
                bare = part_of(plan, part)
                given = {name: value.cpu().numpy() for name, value in bare.given().items()}
                bare = replace(bare, hooks=[], **dict.fromkeys(given))
                ticket = Ticket("generate", {"plan": bare, "given": given, **common}, box)
                tickets[ticket] = part
                self._line.put(ticket)
            waiting = set(tickets)
            while waiting:
                ticket, message = box.get()
                part = tickets[ticket]
                if message[0] == "event":
                    event = moved(message[1], part.start)
                    if isinstance(event, ResultEvent):
                        event = outcomes[event.index] = _written(event, plan.paths[event.index])
                    yield event
                    continue
                waiting.discard(ticket)
                if message[0] == "failed":
                    if not isinstance(message[1], Exception):
                        raise message[1]
                    for index in range(part.start, part.stop):
                        if index not in outcomes:
                            outcomes[index] = ResultEvent((index,), error=message[1])
                            yield outcomes[index]
            return [outcomes[i] for i in range(len(plan.prompts))]
        finally:
            for ticket in tickets:
                ticket.cancelled.set()


def _serve(gang: Gang, line: Line, current: dict[int, Ticket], started: queue.Queue[BaseException | None]) -> None:
    """The life of the thread of one gang. It starts the processes, too: they die with the thread that made them."""
    try:
        gang.start()
    except BaseException as error:
        started.put(error)
        return
    started.put(None)
    while (ticket := line.take(gang.index)) is not None:
        if ticket.cancelled.is_set():
            ticket.tell("failed", RunCancelled("the request was cancelled"))
            continue
        current[gang.index] = ticket
        try:
            if not gang.running:
                gang.start()
            outcome: tuple[Any, ...] = ("done", gang.do(ticket))
        except BaseException as error:
            outcome = ("failed", error)
            if not isinstance(error, KinetoscopeError):
                gang.kill()
        current.pop(gang.index, None)
        ticket.tell(*outcome)
        if isinstance(outcome[1], WorkerError):
            _start_again(gang)
    gang.stop()


def _start_again(gang: Gang) -> None:
    """So that the next request need not wait; what hinders it is told to that one."""
    try:
        gang.start()
    except KinetoscopeError as error:
        logger.warning("the processes could not be started again: %s", error)
        time.sleep(0.1)


def _close(
    line: Line, current: Mapping[int, Ticket], threads: Sequence[threading.Thread], gangs: Sequence[Gang]
) -> None:
    """Cancel what waits and runs, let the processes end, and kill what is left."""
    for ticket in line.close():
        ticket.tell("failed", RunCancelled("the executor was closed"))
    for ticket in list(current.values()):
        ticket.cancelled.set()
    for thread in threads:
        thread.join(timeout=15.0)
    for gang in gangs:
        gang.close()


def _written(event: ResultEvent, path: Path | None) -> ResultEvent:
    """Return the outcome of a video as the caller gets it, its file written."""
    if event.result is None:
        return event
    event.result.latents = torch.from_numpy(event.result.latents)
    return write_result(event.result, path, event.index)
