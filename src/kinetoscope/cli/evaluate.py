"""`kinetoscope eval`: does a reference model do what prompts say?"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from kinetoscope.cli.files import write_text
from kinetoscope.cli.options import (
    DEFAULT_MODEL,
    add_compute_options,
    add_device_options,
    add_video_options,
    compute_fields,
    device_fields,
    video_fields,
)
from kinetoscope.core.errors import InputError

NAME = "eval"
HELP = "score prompt following on captions never trained on, with the judge of the model's world"
BATCH = 8
SHEET_ROWS = 16
SCORES = "## Scores"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="a model trained on a world of this package")
    parser.add_argument("--n", type=int, default=300, help="videos (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="of the first video and of the choice of captions")
    parser.add_argument("--json", metavar="FILE", help="write the scores as JSON")
    parser.add_argument("--sheet", metavar="FILE", help=f"write a contact sheet of the first {SHEET_ROWS} videos (PNG)")
    parser.add_argument(
        "--drift", metavar="FILE",
        help="judge each block of the videos by itself too, and plot the scores (PNG): with --frames, of long videos",
    )  # fmt: skip
    parser.add_argument("--drift-frames", type=int, default=12, metavar="N", help="frames of a block (default: 12)")
    parser.add_argument("--card", action="store_true", help="write the scores into the README.md of the model")
    add_video_options(parser)
    add_compute_options(parser)
    add_device_options(parser)


def run(args: argparse.Namespace) -> int:
    """Generate, judge, and print scores beside ground truth and chance."""
    if args.n < 1:
        raise InputError(f"--n={args.n} is not a positive number")
    from kinetoscope.media import check_output, contact_sheet

    for path, suffix in ((args.json, ".json"), (args.sheet, ".png"), (args.drift, ".png")):
        if path:
            check_output(path, (suffix,))

    from kinetoscope.cli.progress import RunProgress, leads
    from kinetoscope.evaluation import as_json, as_table, baselines, flicker, heldout_specs, prompt_following
    from kinetoscope.runtime.generator import VideoGenerator
    from kinetoscope.worlds import get_world

    generator = VideoGenerator.from_pretrained(args.model, **compute_fields(args), **device_fields(args))
    model = generator.pipeline.model
    name = model.sidecar.get("world")
    if name is None:
        raise InputError(f"{args.model} names no world in its kinetoscope.json, so there is no judge for it")
    world = get_world(name)
    specs = heldout_specs(world, args.n, args.seed)
    videos: list[Any] = []
    fields = video_fields(args)
    with RunProgress() as progress:
        for start in range(0, args.n, BATCH):
            part = specs[start : start + BATCH]
            seeds = [args.seed + start + i for i in range(len(part))]
            results = generator.generate_video([s.caption() for s in part], seed=seeds, batch_size=len(part), **fields)
            videos += [r.frames for r in results]
            progress.items("videos", len(videos), args.n)
    generator.close()
    if not leads():
        return 0
    t, h, w = videos[0].shape[:3]
    reports = {
        "model": prompt_following(world, zip(specs, videos, strict=True)),
        **baselines(world, specs, args.seed, height=h, width=w, num_frames=t),
    }
    steadiness = sorted(flicker(v) for v in videos)[len(videos) // 2] if t >= 3 else None
    title = f"{args.n} videos of captions of the world `{name}` that were never trained on, with 95 % intervals:"
    table = as_table(reports)
    if steadiness is not None:
        table += f"\n\nFlicker of the background, median over the videos: {steadiness:.2f} grey levels."
    drifted: dict[str, Any] = {}
    if args.drift:
        from kinetoscope.evaluation.drift import draw_drift, drift_json, drift_table, measure_drift

        drift = measure_drift(world, specs, videos, args.drift_frames, args.seed)
        draw_drift(drift, Path(args.drift))
        drifted = {"drift": drift_json(drift)}
        table += f"\n\nBlock by block, {args.drift_frames} frames each:\n\n{drift_table(drift)}"
    print(f"{title}\n\n{table}")
    if args.json:
        facts = {"model": model.name, "model_hash": model.fingerprint(), "n": args.n, "seed": args.seed}
        scores = {k: as_json(v) for k, v in reports.items()}
        write_text(Path(args.json), json.dumps({**facts, "flicker": steadiness, **scores, **drifted}, indent=2) + "\n")
    if args.sheet:
        rows = min(SHEET_ROWS, args.n)
        contact_sheet(videos[:rows], args.sheet, labels=[s.caption() for s in specs[:rows]], columns=9)
    if args.card:
        card = model.path / "README.md"
        before = card.read_text(encoding="utf-8").partition(SCORES)[0].rstrip() if card.exists() else f"# {model.name}"
        command = f"`{_command(args)}`"
        write_text(card, f"{before}\n\n{SCORES}\n\n{command}\n\n{title}\n\n{table}\n")
    return 0


def _command(args: argparse.Namespace) -> str:
    """What was typed, as far as it sets the scores."""
    given = video_fields(args)
    size = [f"--size {given['height']}x{given['width']}"] if given["width"] else []
    names = {"num_frames": "frames", "num_inference_steps": "steps"}
    rest = [
        f"--{names.get(k, k).replace('_', '-')} {v}"
        for k, v in given.items()
        if v is not None and k not in ("height", "width")
    ]
    dtype = [] if args.dtype == "auto" else [f"--dtype {args.dtype}"]
    drift = [f"--drift {args.drift} --drift-frames {args.drift_frames}"] if args.drift else []
    return " ".join(["kinetoscope eval", args.model, f"--n {args.n} --seed {args.seed}", *size, *rest, *dtype, *drift])
