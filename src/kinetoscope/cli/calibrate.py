"""`kinetoscope calibrate`: measure what a step cache must know of a model."""

from __future__ import annotations

import argparse

from kinetoscope.cli.options import (
    DEFAULT_MODEL,
    add_compute_options,
    add_input_options,
    add_quiet_option,
    add_video_options,
    check_range,
    compute_fields,
    input_fields,
    read_prompts,
    video_fields,
)
from kinetoscope.core.errors import InputError

MAX_PROMPTS, MAX_SEED = 10_000, 2**32 - 1
NAME = "calibrate"
HELP = "measure a model for the step caches magcache and teacache"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_quiet_option(parser)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help=f"a model (default: {DEFAULT_MODEL})")
    parser.add_argument(
        "--prompts-file", metavar="FILE",
        help="prompts to measure on, one a line (default: captions of the model's world, or sentences)",
    )  # fmt: skip
    parser.add_argument("--n", type=int, default=4, help="how many prompts, without --prompts-file (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the first video (default: 0)")
    parser.add_argument("--output", metavar="FILE", help="instead of step_caches.json beside the model")
    add_video_options(parser)
    add_input_options(parser)
    add_compute_options(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, write, and say what was found."""
    check_range("n", args.n, 1, MAX_PROMPTS)
    check_range("seed", args.seed, 0, MAX_SEED - args.n)
    if args.cache is None:
        raise InputError("say what to measure for: --cache magcache or --cache teacache")

    from kinetoscope.cli.progress import RunProgress
    from kinetoscope.evaluation import heldout_specs
    from kinetoscope.runtime.calibrate import PROMPTS, calibrate
    from kinetoscope.runtime.generator import VideoGenerator
    from kinetoscope.worlds import get_world

    cache, args.cache = args.cache, None  # it is measured for, not used
    generator = VideoGenerator.from_pretrained(args.model, **compute_fields(args))
    world = generator.pipeline.model.sidecar.get("world")
    if args.prompts_file:
        prompts = read_prompts(args.prompts_file)
    elif world:
        prompts = [spec.caption() for spec in heldout_specs(get_world(world), args.n, args.seed)]
    else:
        prompts = list(PROMPTS[: args.n])
    with RunProgress(args.quiet) as progress:
        path, found = calibrate(
            generator, cache, prompts, seed=args.seed, output=args.output, on_event=progress.event,
            **video_fields(args), **input_fields(args),
        )  # fmt: skip
    for branch, values in found.get("ratios", {}).items():
        print(f"{branch}: magnitude ratios {min(values[1:]):.3f} to {max(values[1:]):.3f} over {len(values)} steps")
    if "coefficients" in found:
        print(f"polynomial {found['coefficients']}, which explains {found['variance_explained']:.1%} of the variance")
    print(f"written: {path}")
    return 0
