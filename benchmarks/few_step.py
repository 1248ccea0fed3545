"""How much sooner a few-step student is done than its teacher: `python -m benchmarks.few_step`.

Both at their own defaults, in alternation, one thread. What their videos show is scored by `kinetoscope eval`.
"""

from __future__ import annotations

import argparse
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import environment, pairs, report
from kinetoscope import VideoGenerator

PROMPT = "a small red circle moving left on a black background"


def main() -> None:
    """Measure denoising, and prompt to frames."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", default="tiny-t2v", help="embedded name or directory")
    parser.add_argument("--student", default="tiny-t2v-4step", help="embedded name or directory")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--json-out", type=Path, help="file, or folder for few_step.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    models = {
        name: VideoGenerator.from_pretrained(name, device="cpu", dtype="float32")
        for name in (options.teacher, options.student)
    }
    seeds = itertools.count()

    def taken(name: str, *stages: str) -> float:
        timings = models[name].generate_video(PROMPT, seed=next(seeds)).timings
        return sum(timings[stage] for stage in stages or timings)

    def compared(*stages: str) -> dict[str, Any]:
        first, second = (partial(taken, name, *stages) for name in models)
        return pairs(first, second, options.pairs)

    result = {
        "benchmark": "few_step", **environment(), "teacher": options.teacher, "student": options.student,
        "model_hashes": {name: m.pipeline.model.fingerprint() for name, m in models.items()},
        "steps": {name: m.defaults().num_inference_steps for name, m in models.items()},
        "denoising": compared("denoising"), "prompt to frames": compared(),
    }  # fmt: skip
    report(result, "few_step", options.json_out)


if __name__ == "__main__":
    main()
