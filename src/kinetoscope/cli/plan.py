"""`kinetoscope plan`: the layouts of so many devices for one video, compared on paper."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kinetoscope.cli.options import DEFAULT_MODEL, add_video_options, check_range, video_fields

if TYPE_CHECKING:
    from kinetoscope.runtime.layouts import Estimate

NAME = "plan"
HELP = "compare the layouts of several devices for one video, on paper: no device and no weights are needed"
SHOWN = 12
MAX_DEVICES = 1_000_000
OVERRIDES = ("tflops", "memory_gb", "inside_gbps", "between_gbps", "node")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "model", nargs="?", default=DEFAULT_MODEL,
        help="embedded name, directory (configurations are enough) or published id",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="all layouts as JSON, in bytes and seconds")
    group = parser.add_argument_group("devices")
    group.add_argument("--gpus", type=int, default=8, metavar="N", help="devices in all (default: 8)")
    group.add_argument("--replicas", type=int, metavar="N", help="layouts of so many copies only")
    group.add_argument("--device", default="h100", metavar="KIND", help="a100, h100, h200, b200 or cpu (default: h100)")
    group.add_argument("--tflops", type=float, metavar="X", help="dense peak of a device instead of the kind's")
    group.add_argument("--memory-gb", type=float, metavar="X", help="memory of a device")
    group.add_argument("--inside-gbps", type=float, metavar="X", help="1e9 bytes/s one way within a node")
    group.add_argument("--between-gbps", type=float, metavar="X", help="1e9 bytes/s one way to other nodes")
    group.add_argument("--node", type=int, metavar="N", help="devices of a node")
    group.add_argument("--dtype", default="auto", help="of the transformer: bfloat16 (auto; float32 on cpu), ...")
    group.add_argument("--vae", default="whole", metavar="MODE", help="decoding: whole, streaming or tiled")
    group.add_argument("--layouts", type=int, default=SHOWN, metavar="N", help=f"rows to print (default: {SHOWN})")
    add_video_options(parser)


def run(args: argparse.Namespace) -> int:
    """Print the layouts, why the first is first, and what that rests on; 1 if none fits."""
    import torch

    from kinetoscope.core.types import SamplingParams
    from kinetoscope.runtime.accelerators import find_accelerator
    from kinetoscope.runtime.auto import refuses
    from kinetoscope.runtime.device import resolve_dtype
    from kinetoscope.runtime.layouts import as_row, choose
    from kinetoscope.runtime.paper import paper_pipeline
    from kinetoscope.runtime.workload import workload

    check_range("layouts", args.layouts, 1, MAX_DEVICES)
    check_range("gpus", args.gpus, 1, MAX_DEVICES)
    device = find_accelerator(args.device)
    own: dict[str, Any] = {n: v for n in OVERRIDES if (v := getattr(args, n)) is not None}
    device = replace(device, **own, source=device.source + (f"; given: {', '.join(own)}" if own else ""))
    name = ("float32" if device.name == "cpu" else "bfloat16") if args.dtype == "auto" else args.dtype
    dtype = resolve_dtype(name, torch.device("cpu"))
    with paper_pipeline(args.model) as pipeline:
        work = workload(pipeline, SamplingParams(**video_fields(args)), dtype=dtype, vae=args.vae)
        allowed = refuses(pipeline.model, {"vae": args.vae})
        choice = choose(args.gpus, work, device, replicas=args.replicas, allowed=allowed)
    if args.json:
        found = {
            "model": work.model, "device": device.name, "devices": args.gpus, "tokens": work.tokens,
            "assumptions": choice.assumptions(), "layouts": [as_row(e) for e in choice.compared],
            "refused": choice.refused,
        }  # fmt: skip
        print(json.dumps(found, indent=1))
        return 0 if choice.compared and choice.compared[0].fits else 1
    p = work.params
    print(f"{work.model}: {p.height}x{p.width}, {p.num_frames} frames, {p.num_inference_steps} steps")
    print(f"on {args.gpus} x {device.name}; {len(choice.compared)} layouts, fastest first\n")
    _print_table(choice.compared[: args.layouts])
    print("\nassumed:")
    for line in choice.assumptions():
        print(f"  {line}")
    if choice.refused:
        print("left out, an example of each reason and how many:")
        for why, count in choice.refused.items():
            print(f"  {why} ({count})")
    print()
    for line in choice.explain():
        print(line)
    return 0


def _print_table(found: Sequence[Estimate]) -> None:
    rows: list[tuple[str, ...]] = [
        ("layout", "step s", "compute", "waiting", "decode s", "video s", "videos/h", "sent GB", "GB a device", "")
    ]
    for e in found:
        numbers = (e.step, e.compute, e.waiting, e.decode, e.seconds, e.videos, sum(e.sent.values()) / 1e9)
        cells = [f"{n:.3g}" for n in (*numbers, e.peak / 1e9)]
        rows.append((str(e.config), *cells, "" if e.fits else "too much"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(cells).rstrip())
