"""How a world is played: frames a second, and how long after an action it is seen: `python -m benchmarks.play MODEL`.

A session is played for some blocks of a size and some steps each; a block is timed from its action to its frames,
decoding included. An action comes at any time of a block, and is taken up by the next one, so from action to sight it
is the rest of the block in progress and the whole of the next:

- `free`: blocks are made one after the other, as fast as they are;
- `paced`: a block is begun just in time to be ready when the one before was shown at the model's frame rate; what is
  done in a frame is seen in the next one, a frame later.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import cores, environment, report
from kinetoscope import VideoGenerator
from kinetoscope.loading.resolve import resolve_model
from kinetoscope.worlds.maze import MazeGame

MODEL = "tiny-world"
WARM = 4  # first blocks, which are not counted
CAMERA = ([0, 0.1], [0, -0.1], [0, 0])


def with_blocks(model: Path, size: int, folder: Path) -> Path:
    """The model's directory with blocks of `size` latent frames; its weights know nothing of it."""
    for part in model.iterdir():
        if part.name != "transformer":
            (folder / part.name).symlink_to(part.resolve())
    (folder / "transformer").mkdir()
    for part in (model / "transformer").iterdir():
        if part.name != "config.json":
            (folder / "transformer" / part.name).symlink_to(part.resolve())
    config = json.loads((model / "transformer" / "config.json").read_text(encoding="utf-8"))
    window = config.get("local_attn_size", -1)
    if window != -1:
        config["local_attn_size"] = max(window, size + config.get("sink_size", 0))
    text = json.dumps(config | {"num_frames_per_block": size})
    (folder / "transformer" / "config.json").write_text(text, encoding="utf-8")
    return folder


def measure(model: Path, threads: int, block: int, steps: int, count: int) -> dict[str, Any]:
    """One session of `count` blocks of `block` latent frames, in float32."""
    with tempfile.TemporaryDirectory() as folder:
        path = with_blocks(model, block, Path(folder))
        generator = VideoGenerator.from_pretrained(path, dtype="float32", threads=threads)
        defaults = generator.pipeline.defaults()
        first = MazeGame(defaults.height or 64, defaults.width or 64).reset(0)
        times = [1000 - 1000 * i // steps for i in range(steps)]
        taken: list[float] = []
        frames: Any = ()
        with generator.start_session(image=first, num_inference_steps=steps, dmd_denoising_steps=times) as session:
            for number in range(WARM + count):
                begun = time.perf_counter()
                frames = session.step(keyboard=[1, 0, 0, 0], mouse=CAMERA[number % len(CAMERA)])
                taken.append(time.perf_counter() - begun)
            shown, rate = len(frames), session.params.fps or 16.0
        size = f"{session.params.height}x{session.params.width}"
        generator.close()
    seconds = np.array(taken[WARM:])
    return {
        "threads": threads,
        "block_latent_frames": block,
        "steps": steps,
        "size": size,
        "frames_a_block": shown,
        "frames_a_second": shown / float(seconds.mean()),
        "block_ms": quantiles(seconds),
        "free_ms": quantiles(free(seconds)),
        "paced_ms": quantiles(paced(seconds, shown / rate) + 1 / rate),
        "paced_at": rate,
    }


def free(seconds: np.ndarray[Any, Any], per_block: int = 50) -> np.ndarray[Any, Any]:
    """Seconds from actions at even times of each block to the frames of the next one."""
    left = (np.arange(per_block) + 0.5) / per_block
    return (left * seconds[:-1, None] + seconds[1:, None]).ravel()


def paced(seconds: np.ndarray[Any, Any], period: float, per_block: int = 50) -> np.ndarray[Any, Any]:
    """As `free`, where blocks are ready every `period` seconds, or as soon as they can be."""
    left = (np.arange(per_block) + 0.5) / per_block
    return (left * np.maximum(seconds[:-1, None], period) + seconds[1:, None]).ravel()


def quantiles(seconds: np.ndarray[Any, Any]) -> dict[str, float]:
    """Median and 95th percentile, in milliseconds."""
    return {f"p{q}": 1e3 * float(np.percentile(seconds, q)) for q in (50, 95)}


def numbers(text: str) -> Sequence[int]:
    """Whole numbers with commas between them."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Every number of threads with every size of block and every number of steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=MODEL, help=f"name or directory (default: {MODEL})")
    parser.add_argument("--threads", type=numbers, default=sorted({1, min(2, cores())}), metavar="N,N")
    parser.add_argument("--blocks", type=numbers, default=[1, 2, 3], metavar="N,N", help="latent frames of a block")
    parser.add_argument("--steps", type=numbers, default=[1, 2, 3], metavar="N,N")
    parser.add_argument("--count", type=int, default=60, help="blocks of each session")
    parser.add_argument("--json-out", type=Path, help="file, or folder for play.json")
    options = parser.parse_args()
    model = resolve_model(options.model)
    sessions = [
        measure(model.path, threads, block, steps, options.count)
        for threads in options.threads
        for block in options.blocks
        for steps in options.steps
    ]
    whole = [s for s in sessions if s["frames_a_second"] >= s["paced_at"]]
    best = min(whole, key=lambda s: s["paced_ms"]["p95"], default=None)
    result = {"benchmark": "play", **environment(), "model": options.model, "model_hash": model.fingerprint(),
              "blocks": options.count}  # fmt: skip
    report({**result, "soonest_in_real_time": best, "sessions": sessions}, "play", options.json_out)


if __name__ == "__main__":
    main()
