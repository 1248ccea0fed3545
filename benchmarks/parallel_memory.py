"""Peak memory of a device of a layout, planned and measured: `python -m benchmarks.parallel_memory`.

A random Wan transformer of 200 M parameters is read and run for one forward of few tokens, so that weights are nearly
all: by one process, and by two that share it by tensor parallel and by FSDP. What is measured is the private memory of
each process, sampled all the time, above what it had before the weights were read; mapped files are not in it. A tiny
model goes first, for what is imported on the way. The C library gives freed buffers back at once here, as with
MALLOC_MMAP_THRESHOLD_=65536; by default it keeps those that FSDP gathers in, which can come to more than the weights.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from benchmarks.measure import environment, report
from kinetoscope.core.types import ExecutionArgs, SamplingParams
from kinetoscope.diffusion.noise import generator_for, randn
from kinetoscope.loading import ModelDir
from kinetoscope.loading.components import load_component
from kinetoscope.parallel import ParallelConfig
from kinetoscope.parallel.groups import join
from kinetoscope.parallel.placement import placing
from kinetoscope.pipelines.presets import build_pipeline
from kinetoscope.runtime.accelerators import ACCELERATORS
from kinetoscope.runtime.layouts import estimate
from kinetoscope.runtime.paper import write_model
from kinetoscope.runtime.workload import Weights, workload

CONFIG: dict[str, Any] = {
    "num_attention_heads": 12,
    "attention_head_dim": 64,
    "ffn_dim": 3072,
    "num_layers": 20,
    "text_dim": 64,
}
SIZE: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 9}
TINY = CONFIG | {"num_attention_heads": 2, "ffn_dim": 128, "num_layers": 2}
MMAP_THRESHOLD, LEAST = -3, 65536
"""Of mallopt: buffers of so many bytes are given back when they are freed."""
TEXT = 16
LAYOUTS = ("", "tp=2", "cfg=2,fsdp=true")
SECONDS = 900


class Sampled:
    """The most private memory that this process has while this is open, above what it had before."""

    def __enter__(self) -> Sampled:
        self.most, self._open, self._before = 0, True, private_bytes()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._open = False
        self._thread.join()

    def _sample(self) -> None:
        while self._open:
            self.most = max(self.most, private_bytes() - self._before)
            time.sleep(0.002)


def private_bytes() -> int:
    """Resident pages of this process that belong to no file (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def make_model(config: dict[str, Any], folder: Path) -> ModelDir:
    """A Wan model of which only the transformer has weights, random ones."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    model = write_model(config, folder)
    WanTransformer3DModel(**config).save_pretrained(folder / "transformer")
    return model


def planned(model: ModelDir, layout: str) -> int:
    """Bytes of the transformer's weights and of its forward, by the cost model."""
    pipeline = build_pipeline(model, ExecutionArgs(torch.device("cpu"), torch.float32))
    work = workload(pipeline, SamplingParams(**SIZE, guidance_scale=1.0))
    kept = work.kept_bytes * TEXT // work.text
    alone = replace(work, encoders=Weights(), vae_bytes=0, vae_activation_bytes=0, vae_fixed_bytes=0, kept_bytes=kept)
    return estimate(ParallelConfig.of(layout), alone, ACCELERATORS["cpu"]).peak


def measured(config: ParallelConfig, rank: int, folder: str, models: list[ModelDir]) -> dict[str, int]:
    """Bytes of one process with the last of the models: of the weights that it holds, and at the most."""
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, LEAST)
    groups = None
    if config.world > 1:
        store = dist.FileStore(str(Path(folder) / f"store-{config}"), config.world)
        groups = join(config, rank=rank, store=store, device=torch.device("cpu"), timeout=SECONDS)
    frames, height, width = 3, SIZE["height"] // 8, SIZE["width"] // 8
    generator = generator_for(0)
    latents, text = randn((1, 16, frames, height, width), generator), randn((1, TEXT, CONFIG["text_dim"]), generator)
    found: dict[str, int] = {}
    place = placing(groups)
    for model in models:
        with Sampled() as memory, torch.no_grad():
            transformer = load_component(
                model, "transformer", dtype=torch.float32, device=torch.device("cpu"), place=place
            )
            transformer(latents, torch.tensor([500.0]), text)
        found = {"weights": held_bytes(transformer), "peak": memory.most}
        del transformer
    if groups is not None:
        dist.barrier()
    return found


def held_bytes(module: nn.Module) -> int:
    """Of the parameters that are here."""
    return sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in module.parameters())


def run(layout: str, models: list[ModelDir], folder: str) -> list[dict[str, int]]:
    """`measured` in forked processes, which cost no imports."""
    config, context = ParallelConfig.of(layout), multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(config.world)]

    def work(rank: int) -> None:
        pipes[rank][1].send(measured(config, rank, folder, models))
        os._exit(0)

    processes = [context.Process(target=work, args=(rank,), daemon=True) for rank in range(config.world)]
    for process in processes:
        process.start()
    found: list[dict[str, int]] = []
    for rank, (receiver, sender) in enumerate(pipes):
        sender.close()
        if not receiver.poll(SECONDS):
            raise TimeoutError(f"process {rank} of {config} did not end within {SECONDS} s")
        found.append(receiver.recv())
    return found


def main() -> None:
    """Measure all layouts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json-out", type=Path, help="file, or folder for parallel_memory.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        models = [make_model(c, Path(folder) / name) for c, name in ((TINY, "tiny"), (CONFIG, "model"))]
        for layout in LAYOUTS:
            each = run(layout, models, folder)
            peak, expected = max(e["peak"] for e in each), planned(models[-1], layout)
            rows.append({
                "parallel": layout or "one device", "weights": max(e["weights"] for e in each), "peak": peak,
                "of_one_device": peak / rows[0]["peak"] if rows else 1.0, "planned": expected,
                "planned_over": expected / peak,
            })  # fmt: skip
    result = {
        "benchmark": "parallel_memory", "command": "python -m benchmarks.parallel_memory",
        **environment(), "transformer": CONFIG, "video": SIZE, "dtype": "float32", "unit": "bytes a process",
        "layouts": rows,
    }  # fmt: skip
    report(result, "parallel_memory", options.json_out)


if __name__ == "__main__":
    main()
