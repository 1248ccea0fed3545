"""What a process of its own costs at one device: `python -m benchmarks.executors`.

The embedded model makes the same video in this process and in a worker of `executor="processes"`, in alternation, with
as many threads. A step is timed where the caller hears of it, from the event that denoising starts to the one that it
ends, so the events' way is in it; a request is the whole call, with the frames' way back. Beside the wall time there is
the processor time of a request, of caller and worker together, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import cores, environment, pairs, report
from kinetoscope import VideoGenerator

MODEL = "tiny-t2v"
PROMPT = "a red circle moving left"
STEPS = 20
DENOISING = "denoising"


def processor(pids: list[int]) -> float:
    """Seconds that all threads of some processes have computed so far (Linux)."""
    threads = [t for pid in pids for t in Path(f"/proc/{pid}/task").iterdir()]
    return sum(int((t / "schedstat").read_text().split()[0]) for t in threads) / 1e9


def timed(generator: VideoGenerator, size: tuple[int, int], frames: int) -> tuple[float, float, float]:
    """Seconds of a step and of the whole request, as the caller sees them, and processor seconds of the request."""
    marks: dict[str, float] = {}

    def hear(event: Any) -> None:
        if event.kind in ("stage_start", "stage_end") and event.stage == DENOISING:
            marks[event.kind] = time.perf_counter()

    pids = [os.getpid(), *(h.pid for h in generator.health() if h.pid)]
    start, used = time.perf_counter(), processor(pids)
    generator.generate_video(
        PROMPT, height=size[0], width=size[1], num_frames=frames, num_inference_steps=STEPS, on_event=hear
    )
    whole, used = time.perf_counter() - start, processor(pids) - used
    return (marks["stage_end"] - marks["stage_start"]) / STEPS, whole, used


def overhead(device: str, threads: int, size: tuple[int, int], frames: int, count: int) -> dict[str, Any]:
    """`count` pairs of requests; ratios are the worker's over those of this process."""
    taken: dict[str, list[tuple[float, float, float]]] = {"there": [], "here": []}
    here = VideoGenerator.from_pretrained(MODEL, device=device, threads=threads)
    executor = "processes:stall=600"
    with VideoGenerator.from_pretrained(MODEL, device=device, threads=threads, executor=executor) as there:

        def step(name: str, generator: VideoGenerator) -> Callable[[], float]:
            def measure() -> float:
                taken[name].append(timed(generator, size, frames))
                return taken[name][-1][0]

            return measure

        steps = pairs(step("there", there), step("here", here), count)
    both = list(zip(taken["there"], taken["here"], strict=True))[1:]  # the first is not counted
    return {
        "size": list(size),
        "frames": frames,
        "steps": STEPS,
        "step": steps,
        "request_extra_s": statistics.median(a[1] - b[1] for a, b in both),
        "request_processor_s": statistics.median(b[2] for _, b in both),
        "request_processor_ratio": statistics.median(a[2] / b[2] for a, b in both),
    }


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--json-out", type=Path, help="a folder, or a .json file")
    args = parser.parse_args()
    shapes = [((64, 64), 9), ((96, 144), 17)]
    rows = [overhead(args.device, args.threads, size, frames, args.pairs) for size, frames in shapes]
    facts = {
        "command": "python -m benchmarks.executors "
        f"--device {args.device} --threads {args.threads} --pairs {args.pairs}",
        "model": MODEL,
        "cores": cores(),
    }
    report({**facts, "environment": environment(), "one_process_against_in_process": rows}, "executors", args.json_out)


if __name__ == "__main__":
    main()
