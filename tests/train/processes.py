"""Two processes that do the same work at once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

LIMIT = 120.0
"""Seconds that a test waits for a process."""


def in_two_processes(work: Callable[[Callable[[], None]], None], what: str) -> None:
    """Run `work` in two forked processes and check that both end well.

    Args:
        work: called with a function that it calls in the middle of its work: this waits until the other process has
            begun too, so that the two overlap.
        what: said where a process is not over in time.
    """
    context = multiprocessing.get_context("fork")  # with torch loaded already
    begun = [context.Event(), context.Event()]

    def one(number: int) -> None:
        import torch

        torch.set_num_threads(1)
        begun[number].set()
        other: Any = begun[1 - number]

        def overlap() -> None:
            assert other.wait(LIMIT), f"the other process did not begin {what} within {LIMIT:g} s"

        work(overlap)

    processes = [context.Process(target=one, args=(number,)) for number in range(2)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(LIMIT)
            assert process.exitcode is not None, f"a process was still {what} after {LIMIT:g} s"
            assert process.exitcode == 0, f"a process failed while {what}"
    finally:
        for process in processes:
            process.kill()
            process.join()
