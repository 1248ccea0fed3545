"""What each process of a layout does: it opens the model as its rank, and answers messages until it is told to stop.

All ranks get the same orders and do the same; the first of them tells the caller. `orders` has what they are told and
what they say.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import traceback
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, Store, TCPStore

from kinetoscope.core.errors import ConfigError, KinetoscopeError, RunCancelled, WorkerError
from kinetoscope.core.extensions import load_extensions
from kinetoscope.core.out_of_memory import is_out_of_memory
from kinetoscope.engine.hooks import StepTraceHook
from kinetoscope.engine.protocols import Event
from kinetoscope.parallel import Groups
from kinetoscope.parallel.groups import join, leave
from kinetoscope.pipelines.composed import StageEvent
from kinetoscope.runtime.executors.orders import (
    OPENING,
    Beat,
    Cancel,
    Cancelled,
    Done,
    Failed,
    Happened,
    Order,
    Ready,
    Said,
    Setup,
    Status,
    Told,
    sendable,
)
from kinetoscope.runtime.executors.ranks import rank_generator
from kinetoscope.runtime.executors.stream import RemoteSession
from kinetoscope.runtime.generator import VideoGenerator
from kinetoscope.runtime.request import VideoPlan
from kinetoscope.runtime.results import ResultEvent
from kinetoscope.runtime.running import open_previews, run_plan
from kinetoscope.runtime.session import Session

BEAT = 1.0
"""Seconds between two signs of life at most; a quarter of the time after which a worker counts as stopped, if less."""
REPORT = "logging_info"
"""Attribute of a session that its caller reads; it is also the answer to "close"."""
TURNS = ("step", "stage_start", "block_start")
"""Events after which a cancelled request stops, on all ranks at once."""


class Worker:
    """One rank. `serve` is its life.

    Args:
        setup: what to open.
        send: sends a message; any thread may call it.
    """

    def __init__(self, setup: Setup, send: Callable[[Said], None]) -> None:
        self.setup = setup
        self.status = Status()
        self._orders: queue.Queue[Order | None] = queue.Queue()
        self._send = send
        self._cancelled: set[int] = set()
        self._ended = threading.Event()
        self._sessions: dict[int, Session | RemoteSession] = {}
        self._number = OPENING

    @property
    def leads(self) -> bool:
        """Whether this is the rank that decides and tells."""
        return self.setup.rank == 0

    def post(self, message: Told) -> None:
        """Take a message, from any thread; a cancellation is heard at once."""
        if isinstance(message, Cancel):
            self._cancelled.add(message.number)
        else:
            self._orders.put(message if isinstance(message, Order) else None)

    def serve(self) -> None:
        """Open the model, then do what comes until told to stop."""
        threading.Thread(target=self._beat, daemon=True).start()
        try:
            self.generator, self.groups = open_worker(self.setup)
            self._control = control_group(self.groups)
        except BaseException as error:
            self._fail(OPENING, error)
            return
        self._idle()
        self._send(Ready())
        while (order := self._orders.get()) is not None:
            number = self._number = order.number
            try:
                outcome = self._drive(number, getattr(self, f"_{order.kind}")(order.payload))
            except BaseException as error:
                self._fail(number, error)
                error.__traceback__ = None  # it would keep the tensors of all its frames
            else:
                self._idle()  # before it is told, so that who asks then hears it
                self._send(outcome)
            self._idle()
            self._cancelled.discard(number)
        self._ended.set()
        for session in self._sessions.values():
            session.close()
        leave()

    # -- orders -------------------------------------------------------------------------------------------------------

    def _generate(self, payload: Mapping[str, Any]) -> Generator[Any, None, Any]:
        """Make videos; their outcomes are events.

        A video that fails of an error that is not of this package leaves the others of the order as they are; where no
        video is made, the error ends the order, and the processes are started again.
        """
        self._take_loras(payload["lora"])
        plan: VideoPlan = replace(
            payload["plan"],
            hooks=[StepTraceHook()] if payload["trace"] and self.leads else [],
            **{name: torch.from_numpy(value) for name, value in payload["given"].items()},
        )
        pipeline = self.generator.pipeline
        previews = open_previews(pipeline, payload["preview"], plan) if self.leads else None
        failed: list[ResultEvent] = []
        made = False
        with (
            self.generator.held(),
            contextlib.closing(
                run_plan(pipeline, self.generator.options, plan, payload["size"], previews, records=self.leads)
            ) as events,
        ):
            for event in events:
                if isinstance(event, ResultEvent):
                    if event.error is not None and not isinstance(event.error, KinetoscopeError):
                        failed.append(event)
                        continue
                    made, event = True, _plain(event)
                yield event
        if failed and not made:
            raise failed[0].error or RuntimeError("a video failed without an error")
        for event in failed:
            yield replace(event, error=_worker_error(event.error))

    def _session(self, payload: Mapping[str, Any]) -> Generator[Any, None, Any]:
        """A stream begins."""
        self._take_loras(payload["lora"])
        session = self.generator.start_session(
            payload["prompt"], blocks=payload["blocks"], on_event=self._tell, **payload["fields"]
        )
        self._sessions[payload["key"]] = session
        yield from ()
        return {"params": session.params, "seed": session.seed, "next_frames": session.next_frames}

    def _session_call(self, payload: Mapping[str, Any]) -> Generator[Any, None, Any]:
        """A block of a stream, a new prompt, its record, or its end: (value, state of the session, error or None)."""
        key, name = payload["key"], payload["name"]
        yield from ()
        session = self._sessions.get(key)
        if session is None:
            lost = "this session was lost when its processes were started again; start a new one"
            return None, {"closed": True}, None if name == "close" else WorkerError(lost, cause="died")
        value: Any = None
        refused: KinetoscopeError | None = None
        try:
            if name != REPORT:
                value = getattr(session, name)(*payload["args"], **payload["kwargs"])
            if name in (REPORT, "close"):
                value = session.logging_info
        except KinetoscopeError as error:  # all ranks raise it alike; it travels with the state that it leaves behind
            refused = error
        finally:
            if name == "close" or session.closed:
                self._sessions.pop(key).close()
        state = {"closed": session.closed, "blocks": session.blocks, "frames": session.frames}
        if not session.closed:
            state["next_frames"] = session.next_frames
        if not self.leads:
            return None
        if name == "step" and value is not None:
            value = np.ascontiguousarray(value)
        return value, state, refused and sendable(refused)

    def _take_loras(self, wanted: list[dict[str, Any]]) -> None:
        """Have the LoRAs that the caller has now, loaded in the same order."""
        have = self.generator.options["lora"]
        if [{**r, "weight": 0} for r in have] != [{**r, "weight": 0} for r in wanted]:
            for record in have:
                self.generator.unload_lora(record["name"])
            for record in wanted:
                self.generator.load_lora(**record)
        elif have != wanted:
            self.generator.set_lora({r["name"]: r["weight"] for r in wanted})

    # -- telling ------------------------------------------------------------------------------------------------------

    def _drive(self, number: int, events: Generator[Any, None, Any]) -> Done | Cancelled:
        """Run an order to its end, or to where the ranks agree to stop it; the message of its outcome."""
        try:
            while True:
                try:
                    event = next(events)
                except StopIteration as stop:
                    return Done(number, stop.value)
                self._tell(event)
                if event.kind in TURNS and self._agree(number in self._cancelled):
                    return Cancelled(number)
        finally:
            events.close()

    def _tell(self, event: Any) -> None:
        before, self.status = self.status.stage, self.status.after(event)
        if self.leads:
            self._send(Happened(self._number, without_tensors(event)))
        elif self.status.stage != before:  # not only at the next sign of life: it may die before
            self._send(Beat(self.status))

    def _agree(self, cancel: bool) -> bool:
        """What the leading rank has heard: one rank that left the loop alone would leave the others waiting."""
        if self._control is None:
            return cancel
        word = torch.tensor([cancel], dtype=torch.uint8)
        dist.broadcast(word, src=0, group=self._control)
        return bool(word.item())

    def _idle(self) -> None:
        self.status = Status("idle", 0, self.status.count + 1)

    def _fail(self, number: int, error: BaseException) -> None:
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        own = error if isinstance(error, KinetoscopeError) and not isinstance(error, RunCancelled) else None
        cause = "memory" if is_out_of_memory(error) else "failed"
        own = None if own is None or sendable(own) is not own else own
        self._send(Failed(number, cause, " ".join(text.split()), own, self.status))
        if not isinstance(error, KinetoscopeError):
            with contextlib.suppress(Exception):  # there may be no memory for it
                traceback.print_exception(error)

    def _beat(self) -> None:
        """Signs of life: this thread goes on while the main one computes or waits for others."""
        while not self._ended.wait(min(BEAT, self.setup.stall / 4)):
            try:
                self._send(Beat(self.status))
            except OSError:
                return


def open_worker(setup: Setup) -> tuple[VideoGenerator, Groups]:
    """Meet the other ranks, and open the model as one of them.

    Raises:
        KinetoscopeError: whatever opening refuses.
    """
    torch.set_num_threads(setup.threads)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("kinetoscope").setLevel(setup.level)
    load_extensions(setup.extensions)
    if isinstance(setup.store, str):
        store: Store = FileStore(setup.store, setup.config.world)
    else:
        host, port = setup.store
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=setup.timeout))
    groups = join(setup.config, rank=setup.rank, store=store, device=setup.device, timeout=setup.timeout)
    options = dict(setup.options)
    if setup.rank > 0:
        options["perf_logging"] = False
    return rank_generator(setup.model, groups, setup.dtype, options), groups


def control_group(groups: Groups) -> dist.ProcessGroup | None:
    """All processes of the layout, for words on the CPU; None for one alone."""
    if groups.config.world == 1:
        return None
    found = dist.new_group(backend="gloo")
    if not isinstance(found, dist.ProcessGroup):
        raise ConfigError("this process is not of its own layout")
    return found


def without_tensors(event: Any) -> Any:
    """An event as other processes get it: previews whole, of a step its numbers."""
    if isinstance(event, StageEvent) or not isinstance(event, Event):
        return event
    step = None if event.step is None else replace(event.step, prediction=None, guided=None)
    return replace(event, step=step, latents=None)


def _plain(event: ResultEvent) -> ResultEvent:
    """Return an outcome whose arrays are fit to travel."""
    result = event.result
    if result is not None:
        latents, frames = result.latents.contiguous().numpy(), np.ascontiguousarray(result.frames)
        result = replace(result, latents=latents, frames=frames)
    return replace(event, result=result, error=event.error and sendable(event.error))


def _worker_error(error: Exception | None) -> WorkerError:
    """Return the error of a video that failed while others of its order were made."""
    assert error is not None
    text = " ".join(f"{type(error).__name__}: {error}".split())
    memory = is_out_of_memory(error)
    how = f"ran out of memory ({text})" if memory else f"failed: {text}"
    return WorkerError(f"the worker {how}; the other videos went on", cause="memory" if memory else "failed")
