"""Processes that die, stop or run out of memory: their request fails by name, the next succeeds, nothing is left."""

from __future__ import annotations

import os
import random
import re
import resource
import signal
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed.forked import Forked, gone
from kinetoscope import VideoGenerator
from kinetoscope.core.errors import WorkerError
from kinetoscope.runtime.executors import processes
from kinetoscope.runtime.executors.pool import Pool
from tiny import make_tiny_wan

ASKED: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5, "fps": 8, "num_inference_steps": 3, "seed": 3}
LONG: dict[str, Any] = {**ASKED, "num_inference_steps": 900}
RED = "a red circle"
PATIENCE = 300.0
"""Seconds for what takes one on an idle machine."""


def shared(pids: Iterable[int | None]) -> list[str]:
    """Shared memory named after processes, as torch names it."""
    names = [p.name for p in Path("/dev/shm").iterdir()] if Path("/dev/shm").is_dir() else []
    return [n for n in names if {str(p) for p in pids} & set(re.split(r"[^0-9]+", n))]


def left(pids: Iterable[int | None]) -> list[str]:
    """Shared memory of processes, and folders of executors."""
    return shared(pids) + [str(p) for p in Path(tempfile.gettempdir()).glob("kinetoscope-*")]


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_wan(tmp_path_factory.mktemp("faults") / "wan")


@pytest.fixture(scope="module")
def expected(wan: Path) -> torch.Tensor:
    return VideoGenerator.from_pretrained(wan, device="cpu").generate_video(RED, **ASKED).latents


@pytest.fixture
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders of executors of this test alone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def launched(private: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The processes that a test starts; in its end nothing of them may be left."""
    pids: list[int] = []

    def launch(descriptor: int) -> Forked:
        process = Forked(descriptor)
        pids.append(process.pid)
        return process

    monkeypatch.setattr(processes, "interpreter", launch)
    yield pids
    assert pids and all(gone(pid) for pid in pids)
    assert not left([*pids, os.getpid()])


@pytest.fixture
def pair(wan: Path, launched: list[int]) -> Iterator[VideoGenerator]:
    """Two ranks."""
    with VideoGenerator.from_pretrained(wan, device="cpu", parallel="ulysses=2") as generator:
        yield generator


def works(generator: VideoGenerator, expected: torch.Tensor) -> bool:
    got = generator.generate_video(RED, **ASKED).latents
    return bool((got - expected).abs().max() <= 1e-4 * expected.std())


def struck(generator: VideoGenerator, rank: int, blow: Any, steps: int = 2) -> WorkerError:
    """The error of a request whose rank gets `blow(pid)` after some steps."""
    pid = generator.health()[rank].pid
    with pytest.raises(WorkerError) as caught:
        for event in generator.iterate(RED, **LONG):
            if event.kind == "step" and event.step.index == steps:
                blow(pid)
    return caught.value


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


def test_killed(pair: VideoGenerator, expected: torch.Tensor) -> None:
    error = struck(pair, 1, kill)
    assert (error.rank, error.cause, error.stage) == (1, "died", "denoising")
    assert "rank 1 of ulysses=2 died of SIGKILL" in str(error) and "in stage denoising" in str(error)
    old = {h.pid for h in pair.health()}
    assert works(pair, expected)
    assert len(old) == 2 and pair.health()[1].alive


@pytest.mark.distributed
def test_stopped(wan: Path, launched: list[int], expected: torch.Tensor) -> None:
    with VideoGenerator.from_pretrained(
        wan, device="cpu", parallel="ulysses=2", executor="processes:stall=8"
    ) as generator:
        error = struck(generator, 1, stop)
        assert (error.rank, error.cause, error.stage) == (1, "stalled", "denoising") and "no sign of life" in str(error)
        assert works(generator, expected)


def test_no_more_memory(wan: Path, launched: list[int], expected: torch.Tensor) -> None:
    with VideoGenerator.from_pretrained(wan, device="cpu", executor="processes") as generator:
        assert works(generator, expected)
        pid = launched[0]
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (24 << 20)
        resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))
        with pytest.raises(WorkerError, match="the worker ran out of memory") as caught:
            generator.generate_video(RED, **{**ASKED, "height": 512, "width": 512, "num_frames": 9})
        # Which stage asks for more than there is depends on what the allocator has kept from before.
        assert caught.value.cause == "memory" and caught.value.stage in ("denoising", "decoding")
        assert f"in stage {caught.value.stage}" in str(caught.value)
        assert works(generator, expected)


def test_one_that_babbles(wan: Path, private: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that cannot be understood is given up at once, not after the time to start."""

    def babble(descriptor: int, parent: int) -> None:
        connection: Any = Connection(descriptor)
        connection.send_bytes(b"")  # no arrays
        connection.send_bytes(b"no pickle")
        signal.pause()

    monkeypatch.setattr(processes, "interpreter", lambda descriptor: Forked(descriptor, babble))
    with pytest.raises(WorkerError, match="said what cannot be read"):
        VideoGenerator.from_pretrained(wan, device="cpu", executor="processes")


def test_requests_that_wait_go_on(pair: VideoGenerator, expected: torch.Tensor) -> None:
    outcomes: dict[str, Any] = {}
    began = threading.Event()

    def first() -> None:
        try:
            for event in pair.iterate(RED, **LONG):
                if event.kind == "step":
                    began.set()
        except WorkerError as error:
            outcomes["first"] = error

    def second() -> None:
        outcomes["second"] = works(pair, expected)

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert began.wait(PATIENCE)
    threads[1].start()
    kill(pair.health()[0].pid or 0)
    for thread in threads:
        thread.join(PATIENCE)
    assert outcomes["second"] is True and outcomes["first"].rank == 0 and outcomes["first"].cause == "died"


def test_one_that_died_while_idle_costs_no_request(
    pair: VideoGenerator, launched: list[int], expected: torch.Tensor
) -> None:
    kill(launched[1])
    assert isinstance(pair.executor, Pool)
    until = time.monotonic() + PATIENCE
    while pair.executor.gangs[0].running:  # until its end has been heard
        assert time.monotonic() < until
        time.sleep(0.05)
    assert works(pair, expected)


def test_a_caller_that_is_killed_takes_them_along(wan: Path, private: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "interpreter", Forked)
    receiver, sender = os.pipe()
    caller = os.fork()
    if caller == 0:
        try:
            generator = VideoGenerator.from_pretrained(wan, device="cpu", parallel="ulysses=2")
            for event in generator.iterate(RED, **LONG):
                if event.kind == "step" and event.step.index == 2:
                    stop(generator.health()[1].pid or 0)  # a stopped one ends, too
                    os.write(sender, ",".join(str(h.pid) for h in generator.health()).encode() + b"\n")
        finally:
            os._exit(1)
    os.close(sender)
    with os.fdopen(receiver) as told:
        pids = [int(text) for text in told.readline().split(",")]
    assert len(pids) == 2 and not gone(pids[0], 0.2)
    kill(caller)
    os.waitpid(caller, 0)
    assert all(gone(pid) for pid in pids)
    assert not shared([caller, *pids])


def test_a_dropped_generator_takes_them_along(wan: Path, launched: list[int]) -> None:
    generator = VideoGenerator.from_pretrained(wan, device="cpu", executor="processes")
    assert not gone(launched[0], 0.1)
    del generator
    assert gone(launched[0])


@pytest.mark.distributed
def test_twenty_kills_at_random(pair: VideoGenerator, expected: torch.Tensor) -> None:
    draw = random.Random(0)
    for _ in range(20):
        rank = draw.randrange(2)
        pid = pair.health()[rank].pid
        assert pid is not None
        timer = threading.Timer(draw.uniform(0.0, 0.6), kill, (pid,))
        with pytest.raises(WorkerError) as caught:
            for event in pair.iterate(RED, **LONG):
                if event.kind == "stage_start" and not timer.ident:
                    timer.start()
        assert caught.value.cause == "died" and caught.value.rank == rank
        assert works(pair, expected)


@pytest.mark.distributed
def test_fresh_interpreters(wan: Path, private: None, expected: torch.Tensor) -> None:
    """As users get them: nothing is inherited but the socket."""
    pids: set[int | None] = set()
    with VideoGenerator.from_pretrained(wan, device="cpu", parallel="ulysses=2") as generator:
        assert works(generator, expected)
        pids |= {h.pid for h in generator.health()}
        error = struck(generator, 0, kill)
        assert (error.rank, error.cause) == (0, "died")
        assert works(generator, expected)
        pids |= {h.pid for h in generator.health()}
    assert len(pids) == 4 and all(gone(pid) for pid in pids if pid) and not left([*pids, os.getpid()])
