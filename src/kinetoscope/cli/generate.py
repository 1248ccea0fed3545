"""`kinetoscope generate`: a video from a prompt."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from kinetoscope.cli.options import (
    DEFAULT_MODEL,
    add_compute_options,
    add_device_options,
    add_input_options,
    add_quiet_option,
    add_video_options,
    compute_fields,
    device_fields,
    input_fields,
    read_prompts,
    video_fields,
)
from kinetoscope.core.errors import InputError
from kinetoscope.core.files import write_text

NAME = "generate"
HELP = "make a video from a prompt"
DEFAULT_PROMPT = "a large red circle moving left on a navy background"
DEFAULT_OUTPUT = "outputs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_quiet_option(parser)
    parser.add_argument("prompt", nargs="?", help=f'what to show (default: "{DEFAULT_PROMPT}")')
    parser.add_argument("--prompt", dest="named_prompt", metavar="TEXT", help="the same as PROMPT")
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help="embedded name, directory or hub id (default: %(default)s)"
    )
    parser.add_argument("--prompts-file", metavar="FILE", help="one prompt a line, instead of PROMPT")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what the unconditional branch reads")
    parser.add_argument("--seed", type=int, default=0, help="of the first video (default: 0)")
    parser.add_argument(
        "--num-videos", type=int, default=1, metavar="N", help="videos a prompt, with seeds SEED, SEED+1, ..."
    )
    parser.add_argument("--fps", type=float, help="frames a second of the file")
    parser.add_argument("--output", "-o", default=DEFAULT_OUTPUT, help="an .mp4 file, or a folder (default: outputs/)")
    parser.add_argument("--trace", action="store_true", help="write a record of every step as JSON beside the video")
    parser.add_argument(
        "--preview", metavar="FILE",
        help="small frames of what each step predicts: a .png shows the latest while it runs, a .gif all of them",
    )  # fmt: skip
    parser.add_argument("--preview-map", metavar="FILE", help="made by fit-preview (default: the one beside the model)")
    add_video_options(parser)
    add_input_options(parser)
    add_compute_options(parser)
    add_device_options(parser)


def run(args: argparse.Namespace) -> int:
    """Generate and tell where the files are and how long each stage took."""
    if args.prompt is not None and args.named_prompt is not None:
        raise InputError("the prompt is given twice, as PROMPT and as --prompt; give one of them")
    if (args.prompt is not None or args.named_prompt is not None) and args.prompts_file:
        raise InputError("give a prompt or --prompts-file, not both")
    if args.num_videos < 1:
        raise InputError(f"--num-videos={args.num_videos} is not a positive number")
    prompts = read_prompts(args.prompts_file) if args.prompts_file else [_prompt(args)]
    seeds = [args.seed + i for _ in prompts for i in range(args.num_videos)]
    prompts = [p for p in prompts for _ in range(args.num_videos)]

    from kinetoscope.cli.progress import RunProgress, leads
    from kinetoscope.runtime.generator import VideoGenerator
    from kinetoscope.runtime.output_names import output_paths

    generator = VideoGenerator.from_pretrained(args.model, **compute_fields(args), **device_fields(args))
    fields: dict[str, Any] = {
        **video_fields(args),
        **input_fields(args),
        "fps": args.fps,
        "negative_prompt": args.negative_prompt,
    }
    one = len(prompts) == 1
    if args.preview_map and not args.preview:
        raise InputError("--preview-map without --preview; give both")
    previews = _preview_files(args.preview, len(prompts)) if args.preview else []
    if previews:
        fields["preview"] = args.preview_map or True
    output = [p for p in output_paths(args.output, prompts, seeds, one=one) if p]
    with RunProgress(args.quiet) as progress:

        def event(event: Any) -> None:
            progress.event(event)
            if event.kind == "preview":
                for offset, frames in enumerate(event.preview.frames):
                    previews[event.first + offset].add(frames)

        results = generator.generate_video(
            prompts, seed=seeds, output_path=output, on_event=event, trace=args.trace, **fields
        )
    generator.close()
    if not leads():  # the first process has all results
        return 0
    for file in previews:
        file.finish()
    for result in results:
        params = result.params
        print(
            f"{result.path}  {params.height}x{params.width}, {params.num_frames} frames, "
            f"{params.num_inference_steps} steps, seed {result.seed}"
        )
        if args.trace:
            print(_write_trace(result))
    for file in previews:
        print(file.path)
    timings = results[-1].timings.items()
    print("  ".join(f"{stage.replace('_', ' ')} {seconds:.2f} s" for stage, seconds in timings if seconds >= 0.0005))
    return 0


def _prompt(args: argparse.Namespace) -> str:
    """Return the prompt of the command line, or the default."""
    return next((p for p in (args.prompt, args.named_prompt) if p is not None), DEFAULT_PROMPT)


def _write_trace(result: Any) -> Path:
    """The step trace as JSON beside the video."""
    return write_text(
        result.path.with_suffix(".trace.json"), json.dumps(result.logging_info["step_trace"], indent=1) + "\n"
    )


def _preview_files(name: str, count: int) -> list[Any]:
    """One for each video, numbered where there are several."""
    from kinetoscope.media import check_output
    from kinetoscope.media.preview import SUFFIXES, PreviewFile

    path = check_output(name, SUFFIXES)
    paths = [path] if count == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(count)]
    return [PreviewFile(p) for p in paths]
