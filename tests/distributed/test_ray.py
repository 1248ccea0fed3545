"""`executor="ray"` on a cluster of this machine: real actors, the same video, named faults, and nothing is left."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch

from distributed.forked import gone
from kinetoscope import VideoGenerator
from kinetoscope.core.errors import CompositionError, ConfigError, WorkerError
from kinetoscope.engine.hooks import Hook
from kinetoscope.runtime.executors import choose
from kinetoscope.runtime.executors.base import ExecutorSpec

MODEL = "tiny-t2v"
ASKED: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "seed": 3}
RED = "a red circle"


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'kinetoscope\[ray\]'"):
        VideoGenerator.from_pretrained(MODEL, device="cpu", executor="ray")


def test_addresses() -> None:
    assert ExecutorSpec.of("ray:address=10.0.0.1:6379,timeout=5") == ExecutorSpec(
        "ray", timeout=5.0, address="10.0.0.1:6379"
    )


@pytest.mark.distributed
def test_two_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # on a busy machine Ray's own 15 starves them
    expected = VideoGenerator.from_pretrained(MODEL, device="cpu").generate_video(RED, **ASKED)
    with pytest.raises(CompositionError, match="hooks= and executor='ray'"):
        VideoGenerator.from_pretrained(MODEL, device="cpu", executor="ray", hooks=[Hook()])
    pids: set[int] = set()

    def works(generator: VideoGenerator) -> None:
        made = generator.generate_video(RED, **ASKED)
        assert (made.latents - expected.latents).abs().max() <= 1e-4 * expected.latents.std()
        assert made.record["options"]["parallel"] == {"ulysses": 2}
        made.frames[0] = 0  # it is the caller's own memory
        found = [h.pid for h in generator.health()]
        assert len(found) == 2 and all(h.alive for h in generator.health())
        pids.update(pid for pid in found if pid)

    with VideoGenerator.from_pretrained(MODEL, device="cpu", parallel="ulysses=2", executor="ray") as generator:
        works(generator)
        events: list[str] = []
        with pytest.raises(WorkerError, match=r"rank 1 of ulysses=2 died .* in stage denoising") as caught:
            for event in generator.iterate(RED, **{**ASKED, "num_inference_steps": 900}):
                events.append(event.kind)
                if events.count("step") == 2 and event.kind == "step":
                    os.kill(generator.health()[1].pid or 0, signal.SIGKILL)
        assert (caught.value.rank, caught.value.cause) == (1, "died")
        works(generator)
    assert len(pids) == 4 and all(gone(pid) for pid in pids)
    assert not ray.is_initialized()  # the cluster was this generator's


@pytest.mark.distributed
def test_a_cluster_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "5")
    with pytest.raises(ConfigError, match="cannot be joined"):
        VideoGenerator.from_pretrained(MODEL, device="cpu", executor="ray:address=auto")
    assert torch.distributed.is_initialized() is False
