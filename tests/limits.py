"""A pytest plugin: a limit on the time of every test, so that one that waits fails and says what it waited for.

The set-up, the call and the tear-down of a test have the limit each. At the limit the test fails with the traceback of
what it waited for, and its forked processes write theirs to the captured stderr. A test that cannot be interrupted
(because it waits in C++) ends the whole session some time later, with the stacks of all threads.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Generator
from types import FrameType

import pytest

import forks

LIMITS = {"slow": 1800.0, "distributed": 600.0}
"""Seconds by marker; far above what a test takes, since a machine may be busy."""
QUICK = 300.0
GRACE = 60.0
"""Seconds after the limit at which a test that did not react ends the session."""

_stderr = os.dup(2)  # before pytest captures it


def limit_of(item: pytest.Item) -> float:
    """Return the seconds that each phase of a test may take: of its `limit` marker, or by its kind."""
    if (own := item.get_closest_marker("limit")) is not None:
        return float(own.args[0])
    return max((LIMITS[mark.name] for mark in item.iter_markers() if mark.name in LIMITS), default=QUICK)


def _limited(item: pytest.Item, phase: str) -> Generator[None, object, object]:
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        return (yield)
    seconds = limit_of(item)

    def strike(number: int, frame: FrameType | None) -> None:
        others = forks.show_stacks()
        sys.stderr.flush()
        pytest.fail(
            f"the {phase} did not end within {seconds:g} s: the last lines of the traceback are what it waited for"
            + (f", and the captured stderr has the stacks of its forked processes {others}" if others else "")
        )

    before = signal.signal(signal.SIGALRM, strike)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=_stderr)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    return (yield from _limited(item, "set-up"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    return (yield from _limited(item, "call"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    return (yield from _limited(item, "tear-down"))
