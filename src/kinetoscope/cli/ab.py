"""`kinetoscope ab`: is one configuration as good as another, and how much faster?"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from kinetoscope.cli.options import (
    DEFAULT_MODEL,
    add_compute_options,
    add_input_options,
    add_quiet_option,
    add_video_options,
    compute_fields,
    input_fields,
    read_prompts,
    video_fields,
)
from kinetoscope.core.errors import InputError

NAME = "ab"
HELP = "compare two configurations, or two sets of videos: likeness, time, memory, and a verdict"
DEFAULT_OUTPUT = "outputs/ab"

_LIMITS = {
    "min_ssim": ("X", "SSIM of every video (default, where no limit is given: 0.95)"),
    "min_ms_ssim": ("X", "multi-scale SSIM of every video"),
    "min_psnr": ("DB", "PSNR of every video"),
    "max_lpips": ("X", "LPIPS of every video"),
    "max_latent_diff": ("STD", "largest difference of the latents, in their standard deviations"),
    "max_flicker_rise": ("GREY", "flicker of B minus that of A in any video, in grey levels"),
    "max_score_drop": ("SHARE", "prompt following of A minus that of B"),
    "max_slowdown": ("RATIO", "wall time of B over that of A"),
    "max_memory": ("RATIO", "peak memory of B over that of A"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_quiet_option(parser)
    parser.add_argument(
        "--a", default=None, metavar="SETTINGS", help='first configuration, "name=value,..." (default: the defaults)'
    )
    parser.add_argument(
        "--b", default=None, metavar="SETTINGS", help='second configuration, for instance "cfg=batched"'
    )
    parser.add_argument(
        "--videos", nargs=2, metavar=("A", "B"), help="compare two folders of videos, or two files, instead"
    )
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help="embedded name, directory or hub id (default: %(default)s)"
    )
    parser.add_argument("--prompt", dest="prompts", action="append", metavar="TEXT", help="what to show (repeatable)")
    parser.add_argument("--prompts-file", metavar="FILE", help="one prompt a line, instead of --prompt")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what the unconditional branch reads")
    parser.add_argument("--seeds", type=_numbers, default=[0], metavar="N,N", help="seeds of each prompt (default: 0)")
    parser.add_argument(
        "--repeats", type=int, default=1, metavar="N", help="runs of each pair, for the clock (default: 1)"
    )
    parser.add_argument("--warmup", type=int, default=1, metavar="N", help="runs before that do not count (default: 1)")
    parser.add_argument(
        "--output", "-o", default=DEFAULT_OUTPUT, metavar="FOLDER",
        help=f"where report.json and report.html go (default: {DEFAULT_OUTPUT})",
    )  # fmt: skip
    parser.add_argument("--keep-videos", action="store_true", help="keep the videos in FOLDER/a and FOLDER/b")
    group = parser.add_argument_group("limits: what B may do at worst")
    for name, (unit, words) in _LIMITS.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=float, metavar=unit, help=words)
    add_video_options(parser)
    add_input_options(parser)
    add_compute_options(parser)


def run(args: argparse.Namespace) -> int:
    """0 if B passes, else 1; the report is written either way."""
    if args.videos and (args.a is not None or args.b is not None):
        raise InputError("give --a and --b, or --videos, not both")
    if not args.videos and args.b is None:
        raise InputError('give --b "name=value,...", or --videos A B')
    if args.prompts and args.prompts_file:
        raise InputError("give --prompt or --prompts-file, not both")
    from kinetoscope.cli.progress import RunProgress
    from kinetoscope.evaluation.compare import Thresholds
    from kinetoscope.media import check_output
    from kinetoscope.runtime.ab import check_thresholds_of_files, compare_files
    from kinetoscope.runtime.compare import compare
    from kinetoscope.runtime.compared import PAGE, REPORT

    thresholds = Thresholds(**{f.name: getattr(args, f.name) for f in fields(Thresholds)})
    asked = thresholds.asked()
    folder = Path(args.output)
    for name in (REPORT, PAGE):
        check_output(folder / name, (Path(name).suffix,))
    with RunProgress(args.quiet) as progress:
        if args.videos:
            check_thresholds_of_files(asked)
            first, second = map(Path, args.videos)
            out = compare_files(first, second, progress.items)
            out.thresholds = thresholds
        else:
            out = compare(
                args.a or "",
                args.b or "",
                read_prompts(args.prompts_file) if args.prompts_file else args.prompts,
                model=args.model,
                seeds=args.seeds,
                options=compute_fields(args),
                thresholds=thresholds,
                repeats=args.repeats,
                warmup=args.warmup,
                videos=folder if args.keep_videos else None,
                on_event=progress.event,
                on_pair=progress.items,
                negative_prompt=args.negative_prompt,
                **video_fields(args),
                **input_fields(args),
            )
    page = out.write(folder)
    _print(out.comparison, asked)
    for line in out.failures:
        print(f"  {line}")
    print(f"verdict: {'pass' if out.passed else 'fail'}  ({page})")
    return 0 if out.passed else 1


def _print(comparison: Any, asked: dict[str, float]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from kinetoscope.evaluation.compare import NAMES
    from kinetoscope.evaluation.report import number

    console = Console(soft_wrap=False)
    count = len(comparison.pairs)
    for side, label in zip("AB", comparison.labels, strict=True):
        console.print(f"{side}  {escape(label) or 'defaults'}", highlight=False, soft_wrap=True)
    table = Table(title=f"{count} pair{'s' if count != 1 else ''}", title_justify="left", box=None, pad_edge=False)
    for column in ("", "mean", "worst", "limit"):
        table.add_column(column, justify="left" if not column else "right")
    for name, values in comparison.measures().items():
        key = name.replace("difference", "diff")
        limit = asked.get(f"min_{key}", asked.get(f"max_{key}"))
        mean = "" if name == "largest_difference" else number(name, values["mean"])
        table.add_row(NAMES[name], mean, number(name, values["worst"]), "" if limit is None else f"{limit:g}")
    console.print(table)
    sides = Table(box=None, pad_edge=False)
    for column in ("", "A", "B", "B / A"):
        sides.add_column(column, justify="left" if not column else "right")
    for stage, t in comparison.time().items():
        if max(t["a"], t["b"]) >= 0.0005:
            sides.add_row(stage.replace("_", " "), f"{t['a']:.3f} s", f"{t['b']:.3f} s", f"{t['ratio']:.3f}")
    if memory := comparison.memory():
        a, b = (f"{memory[side] / 2**20:,.0f} MiB" for side in "ab")
        sides.add_row("peak memory", a, b, f"{memory['ratio']:.3f}")
    if following := comparison.following():
        sides.add_row(f"prompt following of {following[0].total}", *(f"{s.value:.3f}" for s in following), "")
    if sides.row_count:
        console.print(sides)
    for note in comparison.notes:
        console.print(f"not measured: {escape(note)}", highlight=False, soft_wrap=True)


def _numbers(text: str) -> list[int]:
    """Whole numbers from "0,1,2"."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers, for instance 0,1,2") from error
