"""Forked processes of tests: what they may not inherit, and how they say where they wait.

A fork has the memory of its parent and none of its threads. Whoever inherits a thread pool waits for it for ever, so
that Inductor compiles in a forked process itself.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from pathlib import Path

STACKS = signal.SIGUSR1
"""The signal at which a forked process writes the stacks of its threads to stderr, also while it waits in C++."""


def settle_fork() -> None:
    """Take this new process off its parent's threads, and let it answer `STACKS`."""
    if (config := sys.modules.get("torch._inductor.config")) is not None:
        # Its pool of threads stayed in the parent: torch 2.13 resets the other pools in a fork, not this one.
        setattr(config, "compile_threads", 1)  # noqa: B010 - the module has no type
    faulthandler.register(STACKS, file=2, all_threads=True)


def register() -> None:
    """Call `settle_fork` in every process that this one forks from now on."""
    os.register_at_fork(after_in_child=settle_fork)


def show_stacks(seconds: float = 1.0) -> list[int]:
    """Let all descendants of this process that answer write their stacks; return their process ids."""
    pids = [pid for pid in _descendants(os.getpid()) if _catches(pid, STACKS)]
    for pid in pids:
        os.kill(pid, STACKS)
    if pids:
        time.sleep(seconds)
    return pids


def _descendants(pid: int) -> list[int]:
    """Processes below `pid`, where there is a /proc."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):  # it has ended
            continue
    found = [pid]
    for known in found:  # grows
        found += [child for child, parent in parents.items() if parent == known]
    return found[1:]


def _catches(pid: int, number: int) -> bool:
    """Return whether a process has a handler for a signal, which would end it otherwise."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    caught = next((line.split()[1] for line in lines if line.startswith("SigCgt")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)
