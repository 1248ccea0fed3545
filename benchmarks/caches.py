"""Every step cache at its documented setting, against the same videos without one: `python -m benchmarks.caches`.

Pairs in one process, in alternation; `speedup` is the median ratio of the denoising times, SSIM that of the decoded
frames. Skipped rows are counted beside what each method's rule says they should be, worked out here by plain loops.
MagCache and TeaCache are calibrated first, on other captions and seeds, into a temporary file.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import environment, report
from kinetoscope import VideoGenerator
from kinetoscope.core.spec import parse_spec
from kinetoscope.evaluation import heldout_specs
from kinetoscope.evaluation.ssim import similarity
from kinetoscope.runtime.caches import CALIBRATED, read_calibration
from kinetoscope.runtime.calibrate import calibrate
from kinetoscope.worlds import get_world

SETTINGS = (
    "taylorseer",
    "taylorseer:interval=2",
    "magcache:limit=1",
    "teacache:threshold=0.12",
    "fbcache:threshold=0.2,limit=1,warmup=4",
    "dbcache:first=1,threshold=0.2,limit=2,warmup=6",
)
"""What docs/caches.md recommends for the embedded model."""
CALIBRATION_SEED = 5000


def measure(
    plain: VideoGenerator, cached: VideoGenerator, prompts: list[str], steps: int, rounds: int
) -> dict[str, Any]:
    """Time, likeness and skipped rows of one cache over some prompts: pairs in turns, after one that is not counted."""
    seen: list[tuple[float, float, int, int]] = []  # of each pair: ratio, SSIM, rows skipped, and as predicted
    rows = 0
    for turn in range(-1, rounds * len(prompts)):
        seed = max(turn, 0) % len(prompts)
        made: dict[str, Any] = {}
        for name in ("plain", "cached") if turn % 2 else ("cached", "plain"):
            generator = plain if name == "plain" else cached
            made[name] = generator.generate_video(prompts[seed], seed=seed, num_inference_steps=steps, trace=True)
        alike = similarity(made["plain"].frames, made["cached"].frames)
        assert alike.ssim is not None
        told = made["cached"].logging_info
        rows = told["step_cache"]["rows"]
        if turn >= 0:
            ratio = made["plain"].timings["denoising"] / made["cached"].timings["denoising"]
            expected = predicted(cached, told["step_trace"], steps)
            seen.append((ratio, float(alike.ssim.mean()), told["step_cache"]["skipped"], expected))
    ratios, ssim, skipped, expected = zip(*seen, strict=True)
    return {
        "pairs": len(seen),
        "speedup": statistics.median(ratios),
        "speedup_range": [min(ratios), max(ratios)],
        "ssim_mean": statistics.fmean(ssim),
        "ssim_median": statistics.median(ssim),
        "ssim_worst": min(ssim),
        "rows": rows,
        "skipped": skipped[: len(prompts)],
        "skipped_as_predicted": skipped == expected,
    }


def predicted(generator: VideoGenerator, trace: list[dict[str, Any]], steps: int) -> int:
    """Rows that the rule of the cache skips: of FBCache by the scores of the run, of the others without the run."""
    name, values = parse_spec(generator.options["cache"], "cache")
    hook: Any = next(h for h in generator.pipeline.hooks if h.name == name)
    branches = [row["branch"] for row in trace[0]["cache"]]
    skipped = 0
    for place, branch in enumerate(branches):
        total, product, in_row = 0.0, 1.0, 0
        for index in range(steps):
            if name == "taylorseer":
                full = index < hook.warmup or (index - hook.warmup - 1) % hook.interval == 0
                skipped += not full
                continue
            if name == "magcache":
                known = read_calibration(generator.pipeline.model, name, values.get("calibration"))
                assert known is not None
                gammas = known["ratios"][branch]
                if index < int(hook.retention * steps + 0.5):
                    continue
                product *= gammas[round(index * (len(gammas) - 1) / (steps - 1))]
                total, in_row = total + abs(1 - product), in_row + 1
                skip = total <= hook.threshold and in_row <= hook.limit
            elif name == "teacache":
                r = changes_of_time(generator, steps)[index]
                if index < hook.warmup:
                    continue
                total += sum(c * r ** (4 - power) for power, c in enumerate(hook.coefficients))
                skip = total < hook.threshold
            else:
                score = trace[index]["cache"][place]["score"]
                free = index >= hook.warmup and (hook.limit == 0 or in_row < hook.limit)
                skip = free and score is not None and score <= hook.threshold
                in_row = in_row + 1 if skip else 0
            skipped += skip
            if not skip:
                total, product, in_row = 0.0, 1.0, 0
    return skipped


def changes_of_time(generator: VideoGenerator, steps: int) -> list[float]:
    """mean|e - e'| / mean|e'| of the projected time embedding, of each step against the one before."""
    pipeline = generator.pipeline
    params = generator.defaults()
    prototype = pipeline.get_module("scheduler").override(params.scheduler, params.flow_shift)
    times = prototype.start(steps, "cpu").timesteps
    with torch.no_grad():
        embedder = pipeline.get_module("transformer").condition_embedder
        signal = [embedder.embed_time(t.view(1, 1))[1].float() for t in times]
    return [0.0, *(float((b - a).abs().mean() / a.abs().mean()) for a, b in itertools.pairwise(signal))]


def main() -> None:
    """Measure the settings that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny-t2v", help="embedded name or directory")
    parser.add_argument("--settings", nargs="*", default=SETTINGS, help="caches with their settings")
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--pairs", type=int, default=1, help="pairs a video")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json-out", type=Path, help="file, or folder for caches.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    plain = VideoGenerator.from_pretrained(options.model, device="cpu", dtype="float32")
    world = get_world(plain.pipeline.model.sidecar["world"])
    prompts = [spec.caption() for spec in heldout_specs(world, options.videos, 0)]
    result: dict[str, Any] = {
        "benchmark": "caches", **environment(), "model": options.model,
        "model_hash": plain.pipeline.model.fingerprint(), "steps": options.steps, "videos": options.videos,
        "caches": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "calibration.json"
        names = {parse_spec(s, "cache")[0] for s in options.settings}
        others = [spec.caption() for spec in heldout_specs(world, 4, CALIBRATION_SEED)]
        for name in CALIBRATED:
            if name in names:
                calibrate(plain, name, others, seed=CALIBRATION_SEED, output=file, num_inference_steps=options.steps)
        for setting in options.settings:
            sys.stderr.write(f"{setting} ...\n")
            name = parse_spec(setting, "cache")[0]
            text = setting
            if name in CALIBRATED:
                text += f"{',' if ':' in setting else ':'}calibration={file}"
            cached = VideoGenerator.from_pretrained(
                options.model, device="cpu", dtype="float32", cache=text, modules=plain.pipeline.loaded_modules()
            )
            result["caches"].append({"cache": setting, **measure(plain, cached, prompts, options.steps, options.pairs)})
    report(result, "caches", options.json_out)


if __name__ == "__main__":
    main()
