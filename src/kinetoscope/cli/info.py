"""`kinetoscope info`: what a model holds and what a run costs, before running."""

from __future__ import annotations

import argparse

from kinetoscope.cli.options import DEFAULT_MODEL, add_compute_options, add_video_options, compute_fields, video_fields

NAME = "info"
HELP = "what a model directory holds, and what a video costs: tokens, PFLOP, memory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="embedded name, directory or hub id")
    add_video_options(parser)
    add_compute_options(parser)


def run(args: argparse.Namespace) -> int:
    """Print components, defaults and the plan of one video."""
    from kinetoscope.core.types import SamplingParams
    from kinetoscope.runtime.generator import VideoGenerator
    from kinetoscope.runtime.plan import plan_run, summarize

    generator = VideoGenerator.from_pretrained(args.model, **compute_fields(args))
    model = generator.pipeline.model
    print(f"{model.name}  ({model.path})")
    print(f"hash {model.fingerprint()[:16]}\n")
    for part in summarize(generator):
        weights = f"{part.parameters / 1e6:10.2f} M  {part.file_bytes / 1e6:9.1f} MB  {', '.join(part.dtypes)}"
        print(f"  {part.name:14} {part.class_name:28} {weights if part.parameters else ''}".rstrip())
    plan = plan_run(generator, SamplingParams(**video_fields(args)))
    p = plan.params
    print(
        f"\none video: {p.height}x{p.width}, {p.num_frames} frames at {p.fps:g} a second, "
        f"{p.num_inference_steps} steps, guidance {p.guidance_scale:g}"
    )
    print(f"  latents    {' x '.join(map(str, plan.latent_shape))}")
    print(f"  tokens     {plan.tokens:,} a row, {plan.forwards} rows in all")
    print(f"  compute    {plan.pflop:.4g} PFLOP in the transformer")
    print(
        f"  memory     {_amount(plan.weight_bytes)} of weights, "
        f"about {_amount(plan.activation_bytes)} of transformer activations"
    )
    return 0


def _amount(count: int) -> str:
    """Bytes in the unit that suits them."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
