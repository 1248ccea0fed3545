"""`kinetoscope preprocess`: from clips and captions to latents and text states, for training."""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from typing import Any

from kinetoscope.cli.options import parse_size

NAME = "preprocess"
HELP = "encode clips and captions once, for training; the same command continues an interrupted run"
SHOWN = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("model", help="whose VAE and text encoder are used: an embedded name, a directory, a hub id")
    parser.add_argument(
        "source", help="a folder of clips with .txt captions, a .jsonl or .csv file, webdataset .tar, or world:NAME"
    )
    parser.add_argument("output", help="folder of the data set")
    group = parser.add_argument_group("source")
    group.add_argument(
        "--kind", default="auto", choices=("auto", "folder", "jsonl", "csv", "tar", "world"), help="(default: auto)"
    )
    group.add_argument("--clips", type=int, metavar="N", help="how many clips of a world")
    group.add_argument("--split", default="train", choices=("train", "heldout"), help="captions of a world")
    group = parser.add_argument_group("buckets (defaults come from the model)")
    group.add_argument(
        "--size", dest="sizes", action="append", default=[], type=parse_size, metavar="HxW",
        help="height x width (repeatable); a clip goes to the one of the nearest proportions",
    )  # fmt: skip
    group.add_argument(
        "--aspects", type=parse_aspects, default=[], metavar="W:H,...",
        help="instead of further sizes: proportions at the area of the first size, for instance 16:9,1:1,9:16",
    )  # fmt: skip
    group.add_argument(
        "--frames", action="append", default=[], type=int, metavar="N",
        help="length (repeatable); a clip gives the longest that it has frames for",
    )  # fmt: skip
    group.add_argument("--fps", type=float, metavar="F", help="frames a second that clips are brought to")
    group.add_argument("--every-window", action="store_true", help="cut long clips into as many rows as they give")
    group.add_argument("--upscale", action="store_true", help="take clips that are smaller than their bucket")
    group.add_argument("--uncaptioned", action="store_true", help="take clips without a caption, with the empty one")
    group = parser.add_argument_group("computing")
    group.add_argument("--device", default="auto", help="auto (all CUDA devices, else cpu), cpu, cuda, cuda:1, ...")
    group.add_argument("--dtype", default="auto", help="of the text encoder: auto, float32, bfloat16, float16")
    group.add_argument(
        "--stored", default="float32", choices=("float32", "bfloat16", "float16"), help="numbers in the data set"
    )
    group.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default: 1)")
    group.add_argument(
        "--engine", default="processes", metavar="SPEC",
        help="what runs them: processes (of this machine; default), ray, or ray:address=auto (of a cluster)",
    )  # fmt: skip
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads of each process")
    group.add_argument("--shard", type=int, default=32, metavar="N", help="clips a file (default: 32)")


def parse_aspects(text: str) -> list[tuple[float, float]]:
    """Proportions (width, height) from "16:9,1:1"."""
    found: list[tuple[float, float]] = []
    for part in text.split(","):
        across, _, down = part.partition(":")
        try:
            pair = float(across), float(down)
        except ValueError:
            pair = 0.0, 0.0
        if not (0 < pair[0] < 100 * pair[1] < 10_000 * pair[0]):
            raise argparse.ArgumentTypeError(f"{part!r} is not WIDTH:HEIGHT, for instance 16:9")
        found.append(pair)
    return found


def run(args: argparse.Namespace) -> int:
    """Make the data set and say what became of the clips."""
    import torch

    from kinetoscope.cli.progress import RunProgress
    from kinetoscope.runtime.device import resolve_device, resolve_dtype
    from kinetoscope.train.data.preprocess import preprocess

    device = resolve_device(args.device)
    devices = [str(device)]
    if device == torch.device("cuda") and args.device == "auto":
        devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    same: dict[str, Any] = {
        name: getattr(args, name)
        for name in (
            "kind", "clips", "split", "sizes", "aspects", "frames", "fps", "every_window", "upscale", "uncaptioned",
            "stored", "shard", "workers", "threads", "engine",
        )
    }  # fmt: skip
    with RunProgress() as progress:
        made = preprocess(
            args.model, args.source, args.output, **same, devices=devices, dtype=resolve_dtype(args.dtype, device),
            on_count=progress.resumed("clips"),
        )  # fmt: skip
    print(f"{made.folder}: {made.rows} rows of {made.clips} clips, {len(made.rejected)} rejected")
    reasons = Counter(_kind(r["reason"]) for r in made.rejected).most_common()
    for reason, count in reasons[:SHOWN]:
        print(f"  {count} x {reason}")
    if rest := sum(count for _, count in reasons[SHOWN:]):
        print(f"  {rest} for other reasons")
    if made.rejected:
        print(f"each with its reason: {made.folder / 'rejected.jsonl'}")
    if not made.rows:
        print("nothing can be trained on this data set: it has no rows", file=sys.stderr)
    return 0 if made.rows else 1


def _kind(reason: str) -> str:
    """A reason without its numbers, so that like ones are counted together."""
    return re.sub(r"[0-9]+", "#", reason)
