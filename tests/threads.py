"""Work in several threads at once, with a limit on how long a test waits for it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

LIMIT = 300.0
"""Seconds that a test waits for its threads."""


@contextmanager
def quick_switches() -> Iterator[None]:
    """Let threads take turns a thousand times as often as usual, so that they meet in the middle of things."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def in_threads(work: Sequence[Callable[[], Any]], limit: float = LIMIT) -> list[Any]:
    """Return what each callable returns, each in a thread of its own, all begun together; the first error is raised.

    Raises:
        TimeoutError: a thread has not ended within the limit; says which.
    """
    results: list[Any] = [None] * len(work)
    errors: list[BaseException] = []
    begin = threading.Barrier(len(work))

    def run(index: int) -> None:
        begin.wait(limit)
        try:
            results[index] = work[index]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(work))]
    with quick_switches():
        for thread in threads:
            thread.start()
        for index, thread in enumerate(threads):
            thread.join(limit)
            if thread.is_alive():
                raise TimeoutError(f"thread {index} of {len(threads)} has not ended after {limit:.0f} s")
    if errors:
        raise errors[0]
    return results
