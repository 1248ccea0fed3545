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
    check_range,
    compute_fields,
    device_fields,
    input_fields,
    read_prompts,
    video_fields,
)
from kinetoscope.core.errors import InputError
from kinetoscope.core.files import check_output_path, write_text

NAME = "generate"
HELP = "make a video from a prompt"
DEFAULT_PROMPT = "a large red circle moving left on a navy background"
DEFAULT_OUTPUT = "outputs"
MAX_VIDEOS = 10_000
TRACE = ".trace.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_quiet_option(parser)
    parser.add_argument("prompt", nargs="?", help=f'what to show (default: "{DEFAULT_PROMPT}")')
    parser.add_argument("--prompt", dest="named_prompt", metavar="TEXT", help="the same as PROMPT")
    parser.add_argument(
        "--config", metavar="FILE",
        help="a YAML file with the settings of a run; options of the command stand above it, and --set "
        "sampling.num_inference_steps=20 changes one of its keys",
    )  # fmt: skip
    parser.add_argument("--model", help=f"embedded name, directory or hub id (default: {DEFAULT_MODEL})")
    parser.add_argument("--prompts-file", metavar="FILE", help="one prompt a line, instead of PROMPT")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what the unconditional branch reads")
    parser.add_argument("--seed", type=int, help="of the first video (default: 0)")
    parser.add_argument(
        "--num-videos", type=int, default=1, metavar="N", help="videos a prompt, with seeds SEED, SEED+1, ..."
    )
    parser.add_argument("--fps", type=float, help="frames a second of the file")
    parser.add_argument("--output", "-o", help=f"an .mp4 file, or a folder (default: {DEFAULT_OUTPUT}/)")
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
    check_range("num-videos", args.num_videos, 1, MAX_VIDEOS)

    from kinetoscope.cli.progress import RunProgress, leads
    from kinetoscope.runtime.generator import VideoGenerator
    from kinetoscope.runtime.output_names import output_paths

    config = _settings(args)
    prompts, seeds = _prompts_and_seeds(config, args.num_videos)
    fields: dict[str, Any] = {**config.sampling, **config.inputs, "negative_prompt": config.negative_prompt}
    generator = VideoGenerator.from_pretrained(config.model or DEFAULT_MODEL, **config.options)
    one = len(prompts) == 1
    if args.preview_map and not args.preview:
        raise InputError("--preview-map without --preview; give both")
    previews = _preview_files(args.preview, len(prompts)) if args.preview else []
    if previews:
        fields["preview"] = args.preview_map or True
    output = [p for p in output_paths(config.output or DEFAULT_OUTPUT, prompts, seeds, one=one) if p]
    for path in output if args.trace else []:
        check_output_path(path.with_suffix(TRACE))
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


def _settings(args: argparse.Namespace) -> Any:
    """Return the run configuration: options of the command over those of its file (`RunConfig`)."""
    from kinetoscope.runtime.run_config import RunConfig

    dotted = [text for text in args.extra if "." in text.partition("=")[0]]
    args.extra = [text for text in args.extra if text not in dotted]
    config = RunConfig.read(args.config, dotted)
    if args.prompts_file:
        config.prompt = read_prompts(args.prompts_file)
    named = {"prompt": args.prompt if args.prompt is not None else args.named_prompt}
    for name in ("model", "negative_prompt", "seed", "output"):
        named[name] = getattr(args, name)
    for name, value in named.items():
        if value is not None:
            setattr(config, name, value)
    config.sampling |= {n: v for n, v in {**video_fields(args), "fps": args.fps}.items() if v is not None}
    config.inputs |= input_fields(args)
    if args.size is None and "height" in config.sampling and "width" in config.sampling:
        args.size = config.sampling["height"], config.sampling["width"]  # what "auto" chooses a layout for
    args.frames = args.frames or config.sampling.get("num_frames")
    devices = {n: v for n, v in device_fields(args).items() if v is not None}
    config.options |= compute_fields(args) | devices
    return config


def _prompts_and_seeds(config: Any, count: int) -> tuple[list[str], list[int]]:
    """Return a prompt and a seed for each video: `count` of each prompt, with seeds one after another.

    Raises:
        InputError: lists that are not as long as the prompts, or that go with several videos of each prompt.
    """
    prompt = DEFAULT_PROMPT if config.prompt is None else config.prompt
    prompts = prompt if isinstance(prompt, list) else [prompt]
    if count > 1 and (isinstance(config.seed, list) or isinstance(config.negative_prompt, list)):
        raise InputError(f"--num-videos={count} needs one seed and one negative prompt for all prompts, not lists")
    if isinstance(config.seed, list):
        if len(config.seed) != len(prompts):
            raise InputError(f"{len(prompts)} prompts but {len(config.seed)} values for seed; give one or one each")
        return prompts, config.seed
    seeds = [(config.seed or 0) + i for _ in prompts for i in range(count)]
    return [p for p in prompts for _ in range(count)], seeds


def _write_trace(result: Any) -> Path:
    """The step trace as JSON beside the video."""
    return write_text(result.path.with_suffix(TRACE), json.dumps(result.logging_info["step_trace"], indent=1) + "\n")


def _preview_files(name: str, count: int) -> list[Any]:
    """One for each video, numbered where there are several."""
    from kinetoscope.media import check_output
    from kinetoscope.media.preview import SUFFIXES, PreviewFile

    path = check_output(name, SUFFIXES)
    paths = [path] if count == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(count)]
    return [PreviewFile(check_output(p, SUFFIXES)) for p in paths]
