"""One process a device on this machine, each a fresh interpreter: `executor="processes"`."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from kinetoscope.loading import ModelDir
from kinetoscope.parallel import ParallelConfig
from kinetoscope.runtime.executors.base import ExecutorSpec
from kinetoscope.runtime.executors.gang import Gang, Inbox, Link
from kinetoscope.runtime.executors.orders import Died, Setup, Told
from kinetoscope.runtime.executors.pool import Pool
from kinetoscope.runtime.executors.wire import Wire

DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux
MakeSetup = Callable[[int, int, "str | tuple[str, int]"], Setup]
"""(replica, rank, store) -> the setup of a process."""


class Process(Protocol):
    """What is needed of a process that was started, as `subprocess.Popen` has it."""

    pid: int

    def wait(self, timeout: float | None = None) -> int: ...

    def kill(self) -> None: ...


Launch = Callable[[int], Process]


def interpreter(descriptor: int) -> Process:
    """A fresh interpreter.

    Not by multiprocessing: its children import the caller's script again, and it starts a process of its own.
    """
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; "
        f"from kinetoscope.runtime.executors.processes import live; live({descriptor}, {os.getpid()})"
    )
    return subprocess.Popen([sys.executable, "-c", code], pass_fds=[descriptor], stdin=subprocess.DEVNULL)


class MultiProcExecutor(Pool):
    """Processes of this machine, one a rank, watched and restarted.

    Args:
        config: the layout.
        model: the directory.
        spec: times after which a process is given up.
        setup: what each process opens.
        launch: starts a process that calls `live` with a descriptor of a socket.
    """

    def __init__(
        self,
        config: ParallelConfig,
        model: ModelDir,
        spec: ExecutorSpec,
        setup: MakeSetup,
        launch: Launch | None = None,
    ) -> None:
        own = replace(config, replicas=1)
        gangs = [Gang(i, own, spec, _Starter(i, own, setup, launch or interpreter)) for i in range(config.replicas)]
        super().__init__("processes", config, model, gangs)


class _Starter:
    """Starts the processes of one replica, which meet in a folder of their own."""

    def __init__(self, replica: int, config: ParallelConfig, setup: MakeSetup, launch: Launch) -> None:
        self.replica = replica
        self.config = config
        self.setup = setup
        self.launch = launch

    def __call__(self, inbox: Inbox) -> Sequence[Link]:
        folder = Path(tempfile.mkdtemp(prefix="kinetoscope-"))
        left = Countdown(self.config.world, lambda: shutil.rmtree(folder, ignore_errors=True))
        links: list[Link] = []
        try:
            for rank in range(self.config.world):
                setup = self.setup(self.replica, rank, str(folder / "store"))
                links.append(_Process(self.launch, rank, setup, inbox, left))
        except BaseException:
            for link in links:
                link.kill()
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return links


class Countdown:
    """Does something when it was called so many times."""

    def __init__(self, count: int, then: Callable[[], None]) -> None:
        self._count = count
        self._then = then
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self._count -= 1
            if self._count == 0:
                self._then()


class _Process:
    """A worker process, and the thread that hears it."""

    def __init__(self, launch: Launch, rank: int, setup: Setup, inbox: Inbox, gone: Callable[[], None]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = launch(theirs.fileno())
        self._wire = Wire(ours.detach())
        self.pid: int | None = self._process.pid
        self._hearing = threading.Thread(target=self._hear, args=(rank, inbox, gone), daemon=True)
        self._hearing.start()
        with contextlib.suppress(OSError):  # the thread tells that it died
            self._wire.send(setup)

    def send(self, message: Told) -> None:
        """See `Link`."""
        self._wire.send(message)

    def kill(self) -> None:
        """See `Link`."""
        self._process.kill()
        self._process.wait()
        self._hearing.join(timeout=5.0)  # it clears up behind the process

    def wait(self, seconds: float) -> bool:
        """See `Link`."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _hear(self, rank: int, inbox: Inbox, gone: Callable[[], None]) -> None:
        try:
            while True:
                inbox.put((rank, self._wire.receive()))
        except (EOFError, OSError):
            inbox.put((rank, Died(how_it_ended(self._process.wait()))))
        except Exception as error:  # a worker of another version, perhaps; nobody would hear it from now on
            inbox.put((rank, Died(f"said what cannot be read ({error})")))
            self._process.kill()
        finally:
            self._wire.close()
            gone()


def how_it_ended(status: int) -> str:
    """A process' end in words."""
    if status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name
    hint = ", perhaps by the system for lack of memory" if name == "SIGKILL" else ""
    return f"died of {name}{hint}"


def live(descriptor: int, parent: int) -> None:
    """What a worker process does: its setup comes first, then what it is to do; it does not outlive its parent."""
    from kinetoscope.runtime.executors.worker import Worker  # it opens generators, and they open executors

    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the caller's terminal; the caller decides what it means
    wire = Wire(descriptor)
    worker = Worker(wire.receive(), _quiet(wire.send))

    def listen() -> None:
        try:
            while True:
                worker.post(wire.receive())
        except (EOFError, OSError):
            os._exit(1)  # the parent is gone

    threading.Thread(target=listen, daemon=True).start()
    worker.serve()
    os._exit(0)  # nothing is left to tell, and threads of libraries may not end


def _quiet(send: Callable[[Any], None]) -> Callable[[Any], None]:
    """`send`, ending the process when nobody listens any more."""

    def told(message: Any) -> None:
        try:
            send(message)
        except (BrokenPipeError, ConnectionError):
            os._exit(1)

    return told
