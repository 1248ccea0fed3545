"""`kinetoscope replay`: make a video again from the record inside it."""

from __future__ import annotations

import argparse

from kinetoscope.cli.options import add_quiet_option

NAME = "replay"
HELP = "make a video again from the record inside its file, and compare"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_quiet_option(parser)
    parser.add_argument("file", help="an .mp4 written by kinetoscope")
    parser.add_argument("--output", "-o", metavar="FILE", help="write the new video here")
    parser.add_argument(
        "--write-config", metavar="FILE",
        help="write the settings of the video as YAML for `generate --config`, and make no video",
    )  # fmt: skip
    parser.add_argument("--model", help="where the model is now, if it has moved")
    parser.add_argument(
        "--files",
        metavar="DIR",
        help="folder of the files that the record names (default: the video's)",
    )


def run(args: argparse.Namespace) -> int:
    """0 if the frames are the recorded ones: bit for bit, or to rounding if others were made with them; else 1."""
    from kinetoscope.cli.progress import RunProgress
    from kinetoscope.runtime.replay import replay

    if args.write_config:
        return _write_config(args)
    with RunProgress(args.quiet) as progress:
        report = replay(args.file, args.output, model=args.model, files=args.files, on_event=progress.event)
    if args.output:
        print(args.output)
    for line in report.differences:
        print(f"differs: {line}")
    if report.identical:
        print("identical: every frame is the same, bit for bit")
    elif report.same:
        print(f"the same to rounding: it was made together with {report.joined - 1} others, and now alone")
    else:
        near = "" if report.psnr is None else f": {report.psnr:.1f} dB PSNR against the frames in the file"
        print(f"not identical{near}")
    return 0 if report.same else 1


def _write_config(args: argparse.Namespace) -> int:
    """Write what the record holds as a run configuration."""
    from kinetoscope.media import read_metadata
    from kinetoscope.runtime.run_config import RunConfig

    config = RunConfig.of_record(read_metadata(args.file), args.file)
    config.model = args.model or config.model
    print(config.write(args.write_config))
    return 0
