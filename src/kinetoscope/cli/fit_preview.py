"""`kinetoscope fit-preview`: the map from latents to colours that previews of a model use."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kinetoscope.cli.options import (
    DEFAULT_MODEL,
    add_compute_options,
    add_video_options,
    check_range,
    compute_fields,
    read_prompts,
    video_fields,
)
from kinetoscope.core.errors import InputError
from kinetoscope.core.files import write_text

MAX_CLIPS = 1_000_000
NAME = "fit-preview"
HELP = "fit the linear map from latents to colours that `generate --preview` uses, for a model's VAE"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="embedded name, directory or hub id")
    parser.add_argument("--clips", type=int, default=32, metavar="N", help="clips of the model's world (default: 32)")
    parser.add_argument("--videos", metavar="FOLDER", help="encode the .mp4 files of a folder instead")
    parser.add_argument(
        "--prompt", dest="prompts", action="append", metavar="TEXT",
        help="let the model make videos instead (repeatable, at least two); for any VAE",
    )  # fmt: skip
    parser.add_argument("--prompts-file", metavar="FILE", help="one prompt a line, instead of --prompt")
    parser.add_argument("--output", "-o", metavar="FILE", help="where to write it (default: beside the model)")
    add_video_options(parser)
    add_compute_options(parser)


def run(args: argparse.Namespace) -> int:
    """Fit, write, and say how close the colours come."""
    if sum(map(bool, (args.videos, args.prompts, args.prompts_file))) > 1:
        raise InputError("give one of --videos, --prompt and --prompts-file")
    from kinetoscope.cli.progress import RunProgress
    from kinetoscope.core.types import SamplingParams
    from kinetoscope.media import check_output
    from kinetoscope.pipelines.stages.validation import check_params
    from kinetoscope.runtime import preview
    from kinetoscope.runtime.generator import VideoGenerator

    generator = VideoGenerator.from_pretrained(args.model, **compute_fields(args))
    pipeline = generator.pipeline
    path = check_output(Path(args.output) if args.output else pipeline.model.path / preview.FILE, (".json",))
    params = SamplingParams(**video_fields(args)).over(generator.defaults())
    check_params(params, pipeline.geometry)
    size: Any = {"height": params.height, "width": params.width, "num_frames": params.num_frames}
    prompts = read_prompts(args.prompts_file) if args.prompts_file else args.prompts
    with RunProgress() as progress:
        if prompts:
            samples: Iterator[preview.Sample] = (
                (result.latents, result.frames)
                for seed, prompt in enumerate(prompts)
                for result in [
                    generator.generate_video(prompt, seed=seed, on_event=progress.event, **video_fields(args))
                ]
            )
        elif args.videos:
            clips = preview.clips_of(Path(args.videos), pipeline.geometry, **size)
            samples = preview.encoded(pipeline, clips)
        else:
            samples = preview.encoded(pipeline, _world_clips(generator, args, size, progress))
        fit = preview.fit_preview(samples, pipeline.geometry.temporal)
    write_text(path, preview.as_json(fit, pipeline.model, _command(args)))
    print(f"{path}  {fit.psnr:.1f} dB on {fit.clips[1]} clips that were not fitted to ({fit.clips[0]} were)")
    return 0


def _world_clips(generator: Any, args: argparse.Namespace, size: dict[str, Any], progress: Any) -> Iterator[Any]:
    from kinetoscope.worlds import get_world

    name = generator.pipeline.model.sidecar.get("world")
    if name is None:
        raise InputError(f"{args.model} names no world to take clips from; give --videos FOLDER or --prompt TEXT")
    check_range("clips", args.clips, 2, MAX_CLIPS)  # one is fitted to and one scored on
    for seed in range(args.clips):
        yield get_world(name).sample(seed, **size).frames
        progress.items("clips", seed + 1, args.clips)


def _command(args: argparse.Namespace) -> str:
    """What was typed, as far as it sets the map."""
    if args.videos or args.prompts or args.prompts_file:
        return f"kinetoscope {NAME} {args.model} (clips of the user's)"
    return f"kinetoscope {NAME} {args.model} --clips {args.clips}"
