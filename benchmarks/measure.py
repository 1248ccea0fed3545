"""What the benchmarks share: pairs, the peak of matrix products, and where a number was measured."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from kinetoscope.core.onednn import onednn_linear, onednn_serves
from kinetoscope.diffusion.noise import generator_for, randn

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def seconds(call: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def pairs(first: Callable[[], float], second: Callable[[], float], count: int) -> dict[str, Any]:
    """Two measurements in alternation, who begins alternating too, after one of each that is not counted.

    Each callable returns seconds. Ratio and difference are medians over the pairs of first / second and first - second.
    """
    first(), second()
    taken: list[tuple[float, float]] = []
    for index in range(count):
        if index % 2 == 0:
            a, b = first(), second()
        else:
            b, a = second(), first()
        taken.append((a, b))
    ratios = sorted(a / b for a, b in taken)
    return {
        "pairs": count,
        "first_s": statistics.median(a for a, _ in taken),
        "second_s": statistics.median(b for _, b in taken),
        "ratio": statistics.median(ratios),
        "ratio_range": [ratios[0], ratios[-1]],
        "difference_s": statistics.median(a - b for a, b in taken),
    }


@torch.no_grad()
def gemm_peak(dtype: torch.dtype) -> float:
    """Best FLOP/s of large matrix products in `dtype` at the current thread count, by either of torch's libraries."""
    best = 0.0
    generator = generator_for(0)
    for m, k, n in ((2048, 768, 3072), (2048, 2048, 2048), (4096, 1024, 4096)):
        x, w = (randn(shape, generator).to(dtype) for shape in ((m, k), (n, k)))
        calls: list[Callable[[], Any]] = [lambda x=x, w=w: F.linear(x, w)]
        if onednn_serves(x, w):
            calls.append(lambda x=x, w=w: onednn_linear(x, w, None))
        for call in calls:
            call()
            best = max(best, 2 * m * k * n / min(seconds(call) for _ in range(12)))
    return best


def wan_flops(config: Any, tokens: int, text_tokens: int) -> float:
    """Multiply-adds times two of one row through the blocks of a Wan transformer, text projections not counted."""
    d = config.dim
    linears = 6 * d * d + 2 * d * config.ffn_dim  # q, k, v, out; q, out; feed-forward
    attention = 2 * (tokens + text_tokens) * d
    return 2.0 * tokens * config.num_layers * (linears + attention)


def cores() -> int:
    """Processors that this process may run on; fewer than the machine has where it is pinned."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment() -> dict[str, Any]:
    """Where and on what a number was measured."""
    import diffusers
    import transformers

    return {
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "tree_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": _processor(),
        "threads": torch.get_num_threads(),
        "cores": cores(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }


def report(result: dict[str, Any], name: str, out: Path | None) -> None:
    """Print the result as JSON, and write it to `out` (a folder: the file is `name`.json there)."""
    text = json.dumps(_rounded(result), indent=2)
    sys.stdout.write(text + "\n")
    if out is not None:
        file = out if out.suffix == ".json" else out / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".json.part")
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(file)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return value


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = {line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}
    return ", ".join(sorted(names)) or platform.processor() or platform.machine()
