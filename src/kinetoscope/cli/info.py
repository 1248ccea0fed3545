"""`kinetoscope info`: what a model holds and what a run costs, before running."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from kinetoscope.cli.options import DEFAULT_MODEL, add_compute_options, add_video_options, compute_fields, video_fields

NAME = "info"
HELP = "what a model directory holds, and what a video costs: tokens, PFLOP, memory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="embedded name, directory or hub id")
    parser.add_argument("--json", action="store_true", help="as JSON, sizes in bytes")
    add_video_options(parser)
    add_compute_options(parser)


def run(args: argparse.Namespace) -> int:
    """Print components, defaults and the plan of one video."""
    from kinetoscope.core.types import SamplingParams
    from kinetoscope.runtime.generator import VideoGenerator
    from kinetoscope.runtime.plan import plan_run, summarize

    generator = VideoGenerator.from_pretrained(args.model, **compute_fields(args))
    parts = summarize(generator)
    plan = plan_run(generator, SamplingParams(**video_fields(args)))
    if args.json:
        print(json.dumps(_as_json(generator, parts, plan), indent=1))
        return 0
    model = generator.pipeline.model
    print(f"{model.name}  ({model.path})")
    print(f"hash {model.fingerprint()[:16]}\n")
    for part in parts:
        weights = f"{part.parameters / 1e6:10.2f} M  {part.file_bytes / 1e6:9.1f} MB  {', '.join(part.dtypes)}"
        print(f"  {part.name:14} {part.class_name:28} {weights if part.parameters else ''}".rstrip())
    p = plan.params
    print(
        f"\none video: {p.height}x{p.width}, {p.num_frames} frames at {p.fps:g} a second, "
        f"{p.num_inference_steps} steps, guidance {p.guidance_scale:g}"
    )
    print(f"  latents    {' x '.join(map(str, plan.latent_shape))}")
    print(f"  tokens     {plan.tokens:,} a row, {plan.forwards} rows in all")
    print(f"  compute    {plan.pflop:.4g} PFLOP in the transformer")
    _print_memory(generator, plan.memory)
    return 0


def _print_memory(generator: Any, memory: Any) -> None:
    options = {n: generator.options[n] for n in ("quantize", "offload", "vae") if generator.options[n] is not None}
    chosen = ", ".join(f"{n} {v}" for n, v in options.items())
    args = generator.pipeline.args
    print(f"\nmemory on {args.device} in {str(args.dtype).removeprefix('torch.')} ({chosen})")
    for name, size in memory.weights.items():
        print(f"  {name:26} {_amount(size):>10}")
    print(f"  {'one forward, about':26} {_amount(memory.activations):>10}")
    decoding = "not known" if memory.decoding is None else _amount(memory.decoding)
    print(f"  {'decoding, about':26} {decoding:>10}")
    print("  on the device, weights and working memory:")
    for stage, size in memory.peaks.items():
        print(f"    {stage:24} {_amount(size):>10}")
    if memory.host:
        print(f"  {'resting on the host':26} {_amount(memory.host):>10}")


def _as_json(generator: Any, parts: Any, plan: Any) -> dict[str, Any]:
    model = generator.pipeline.model
    return {
        "model": model.name,
        "path": str(model.path),
        "hash": model.fingerprint(),
        "device": str(generator.pipeline.args.device),
        "dtype": str(generator.pipeline.args.dtype).removeprefix("torch."),
        "options": generator.options,
        "components": [asdict(part) for part in parts],
        "params": {k: v for k, v in asdict(plan.params).items() if v is not None},
        "latent_shape": plan.latent_shape,
        "tokens": plan.tokens,
        "rows": plan.forwards,
        "pflop": plan.pflop,
        "memory": {**asdict(plan.memory), "peak": plan.memory.peak},
    }


def _amount(count: int) -> str:
    """Bytes in the unit that suits them."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
