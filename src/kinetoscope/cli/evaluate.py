"""`kinetoscope eval`: does a reference model do what prompts say?"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from kinetoscope.cli.options import DEFAULT_MODEL, add_compute_options, add_video_options, compute_fields, video_fields
from kinetoscope.core.errors import InputError, OutputError

NAME = "eval"
HELP = "score prompt following on captions never trained on, with the judge of the model's world"
SHEET_ROWS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="a model trained on a world of this package")
    parser.add_argument("--n", type=int, default=300, help="videos (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="of the first video and of the choice of captions")
    parser.add_argument("--json", metavar="FILE", help="write the scores as JSON")
    parser.add_argument("--sheet", metavar="FILE", help=f"write a contact sheet of the first {SHEET_ROWS} videos (PNG)")
    add_video_options(parser)
    add_compute_options(parser)


def run(args: argparse.Namespace) -> int:
    """Generate, judge, and print scores beside ground truth and chance."""
    if args.n < 1:
        raise InputError(f"--n={args.n} is not a positive number")

    from kinetoscope.cli.progress import RunProgress
    from kinetoscope.evaluation import as_json, as_table, baselines, flicker, heldout_specs, prompt_following
    from kinetoscope.media import contact_sheet
    from kinetoscope.runtime.generator import VideoGenerator
    from kinetoscope.worlds import get_world

    generator = VideoGenerator.from_pretrained(args.model, **compute_fields(args))
    name = generator.pipeline.model.sidecar.get("world")
    if name is None:
        raise InputError(f"{args.model} names no world in its kinetoscope.json, so there is no judge for it")
    world = get_world(name)
    specs = heldout_specs(world, args.n, args.seed)
    videos: list[Any] = []
    fields = video_fields(args)
    with RunProgress() as progress:
        for start in range(0, args.n, 8):
            part = specs[start : start + 8]
            seeds = [args.seed + start + i for i in range(len(part))]
            results = generator.generate_video([s.caption() for s in part], seed=seeds, batch_size=len(part), **fields)
            videos += [r.frames for r in results]
            progress.items("videos", len(videos), args.n)
    t, h, w = videos[0].shape[:3]
    reports = {
        "model": prompt_following(world, zip(specs, videos, strict=True)),
        **baselines(world, specs, args.seed, height=h, width=w, num_frames=t),
    }
    steadiness = sorted(flicker(v) for v in videos)[len(videos) // 2] if t >= 3 else None
    print(f"{args.n} videos of {name} captions that were never trained on; 95 % intervals\n")
    print(as_table(reports))
    if steadiness is not None:
        print(f"\nflicker of the background, median: {steadiness:.2f} grey levels")
    if args.json:
        scores = {k: as_json(v) for k, v in reports.items()}
        _write_json(
            Path(args.json), {"name": args.model, "n": args.n, "seed": args.seed, "flicker": steadiness, **scores}
        )
    if args.sheet:
        rows = min(SHEET_ROWS, args.n)
        contact_sheet(videos[:rows], args.sheet, labels=[s.caption() for s in specs[:rows]], columns=9)
    return 0


def _write_json(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written: {error}") from error
