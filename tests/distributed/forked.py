"""Worker processes for tests: forked, so that one costs no imports; all else is as in `executors.processes`."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from kinetoscope.runtime.executors.processes import live


class Forked:
    """As `subprocess.Popen`, as far as an executor uses it."""

    def __init__(self, descriptor: int, life: Callable[[int, int], None] = live) -> None:
        parent = os.getpid()
        self._status: int | None = None
        self._lock = threading.Lock()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                forget(descriptor)
                sys.stdout = sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - pytest's are closed now
                life(descriptor, parent)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(1)

    def poll(self) -> int | None:
        with self._lock:
            if self._status is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self._status = os.waitstatus_to_exitcode(status)
            return self._status

    def wait(self, timeout: float | None = None) -> int:
        until = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if until is not None and time.monotonic() > until:
                raise subprocess.TimeoutExpired("worker", timeout or 0.0)
            time.sleep(0.005)
        return status

    def kill(self) -> None:
        with self._lock:
            if self._status is None:
                os.kill(self.pid, 9)


def forget(kept: int) -> None:
    """Give up the parent's files but one: its ends of other sockets would keep dead siblings' open.

    They become /dev/null rather than free: objects of the parent that die here close their numbers, which a new socket
    might have by then.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - numbers, not files
        if int(name) > 2 and int(name) not in (kept, null):
            os.dup2(null, int(name))


def gone(pid: int, seconds: float = 20.0) -> bool:
    """Whether a process ends, or has ended, within so many seconds; one that nobody has reaped yet has ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False
