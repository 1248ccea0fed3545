"""Processes that die, stop or run out of memory: their request fails by name, the next succeeds, nothing is left."""

from __future__ import annotations

import os
import random
import resource
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed.forked import Forked, gone
from kinetoscope import VideoGenerator
from kinetoscope.core.errors import WorkerError
from kinetoscope.runtime.executors import processes
from tiny import make_tiny_wan

ASKED: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5, "fps": 8, "num_inference_steps": 3, "seed": 3}
LONG: dict[str, Any] = {**ASKED, "num_inference_steps": 900}
RED = "a red circle"


def left() -> set[str]:
    """Shared memory, and folders of executors."""
    shared = {str(p) for p in Path("/dev/shm").iterdir()} if Path("/dev/shm").is_dir() else set()
    return shared | {str(p) for p in Path(tempfile.gettempdir()).glob("kinetoscope-*")}


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
def pair(wan: Path, private: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[VideoGenerator]:
    """Two ranks; when they are closed, nothing of them may be left."""
    monkeypatch.setattr(processes, "interpreter", Forked)
    before = left()
    with VideoGenerator.from_pretrained(
        wan, device="cpu", parallel="ulysses=2", executor="processes:stall=6"
    ) as generator:
        yield generator
        pids = [h.pid for h in generator.health()]
        assert len(pids) == 2
    assert all(gone(pid) for pid in pids if pid)
    assert left() == before


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


def test_killed_and_stopped(pair: VideoGenerator, expected: torch.Tensor) -> None:
    error = struck(pair, 1, kill)
    assert (error.rank, error.cause, error.stage) == (1, "died", "denoising")
    assert "rank 1 of ulysses=2 died of SIGKILL" in str(error) and "in stage denoising" in str(error)
    old = {h.pid for h in pair.health()}
    assert works(pair, expected)
    error = struck(pair, 1, stop)
    assert (error.rank, error.cause, error.stage) == (1, "stalled", "denoising") and "no sign of life" in str(error)
    assert works(pair, expected) and not old & {h.pid for h in pair.health()}


def test_no_more_memory(wan: Path, private: None, monkeypatch: pytest.MonkeyPatch, expected: torch.Tensor) -> None:
    monkeypatch.setattr(processes, "interpreter", Forked)
    with VideoGenerator.from_pretrained(wan, device="cpu", executor="processes") as generator:
        assert works(generator, expected)
        pid = generator.health()[0].pid
        assert pid is not None
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (24 << 20)
        resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))
        with pytest.raises(WorkerError, match="the worker ran out of memory") as caught:
            generator.generate_video(RED, **{**ASKED, "height": 512, "width": 512, "num_frames": 9})
        # Which stage asks for more than there is depends on what the allocator has kept from before.
        assert caught.value.cause == "memory" and caught.value.stage in ("denoising", "decoding")
        assert f"in stage {caught.value.stage}" in str(caught.value)
        assert works(generator, expected)
    assert gone(pid)


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
    assert began.wait(60)
    threads[1].start()
    kill(pair.health()[0].pid or 0)
    for thread in threads:
        thread.join(60)
    assert outcomes["second"] is True and outcomes["first"].rank == 0 and outcomes["first"].cause == "died"


def test_one_that_died_while_idle_costs_no_request(pair: VideoGenerator, expected: torch.Tensor) -> None:
    pid = pair.health()[1].pid
    assert pid is not None
    kill(pid)
    while pair.health()[1].alive and pair.health()[1].pid == pid:
        pair.executor.gangs[0].running  # type: ignore[attr-defined]  # noqa: B018 - listens
        time.sleep(0.05)
    assert works(pair, expected)


def test_a_caller_that_is_killed_takes_them_along(wan: Path, private: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "interpreter", Forked)
    shared = {p for p in left() if p.startswith("/dev/shm")}
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
    assert {p for p in left() if p.startswith("/dev/shm")} == shared


def test_a_dropped_generator_takes_them_along(wan: Path, private: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "interpreter", Forked)
    generator = VideoGenerator.from_pretrained(wan, device="cpu", executor="processes")
    pid = generator.health()[0].pid
    assert pid is not None and not gone(pid, 0.1)
    del generator
    assert gone(pid)


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
    before = left()
    with VideoGenerator.from_pretrained(
        wan, device="cpu", parallel="ulysses=2", executor="processes:stall=20"
    ) as generator:
        assert works(generator, expected)
        error = struck(generator, 0, kill)
        assert (error.rank, error.cause) == (0, "died")
        assert works(generator, expected)
        pids = [h.pid for h in generator.health()]
    assert all(gone(pid) for pid in pids if pid) and left() == before
