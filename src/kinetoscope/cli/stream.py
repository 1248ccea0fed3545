"""`kinetoscope stream`: a video written while it is made, block by block."""

from __future__ import annotations

import argparse
import hashlib
import sys
import time

from kinetoscope.cli.options import (
    add_compute_options,
    add_device_options,
    add_input_options,
    add_quiet_option,
    compute_fields,
    device_fields,
    input_fields,
    parse_size,
)

NAME = "stream"
HELP = "make a video block by block with a causal model, and write it as it comes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_quiet_option(parser)
    parser.add_argument("prompt", nargs="?", help="what to show; nothing for models that read no prompt")
    parser.add_argument("--model", required=True, help="directory or hub id of a model that makes blocks")
    parser.add_argument("--blocks", type=int, required=True, metavar="N", help="number of blocks")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what the unconditional branch reads")
    parser.add_argument("--seed", type=int, default=0, help="of the video (default: 0)")
    parser.add_argument("--fps", type=float, help="frames a second of the file")
    parser.add_argument("--output", "-o", default="outputs", help="an .mp4 file, or a folder (default: outputs/)")
    group = parser.add_argument_group("video (defaults come from the model)")
    group.add_argument("--size", type=parse_size, metavar="HxW", help="height x width in pixels, for instance 480x832")
    group.add_argument("--steps", type=int, metavar="N", help="denoising steps")
    group.add_argument("--guidance-scale", type=float, metavar="W", help="classifier-free guidance; 1 is off")
    group.add_argument("--guidance-scale-2", type=float, metavar="W", help="of the low-noise expert (Wan 2.2)")
    group.add_argument("--flow-shift", type=float, metavar="S", help="shift of the noise schedule")
    add_input_options(parser)
    add_compute_options(parser)
    add_device_options(parser)


def run(args: argparse.Namespace) -> int:
    """Make and write one block after the other, with a line on stderr for each."""
    from kinetoscope.cli.progress import leads
    from kinetoscope.media import VideoWriter
    from kinetoscope.runtime.generator import VideoGenerator
    from kinetoscope.runtime.output_names import output_paths

    path = output_paths(args.output, [args.prompt or NAME], [args.seed], one=True)[0]
    assert path is not None
    generator = VideoGenerator.from_pretrained(args.model, **compute_fields(args), **device_fields(args))
    height, width = args.size or (None, None)
    begun, digest = time.perf_counter(), hashlib.sha256()
    with generator.start_session(
        args.prompt,
        blocks=args.blocks,
        negative_prompt=args.negative_prompt,
        seed=args.seed,
        fps=args.fps,
        height=height,
        width=width,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance_scale,
        guidance_scale_2=args.guidance_scale_2,
        flow_shift=args.flow_shift,
        **input_fields(args),
    ) as session:
        params = session.params
        assert params.fps is not None
        if leads() and not args.quiet:
            print(f"ready after {time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)
        if not leads():
            for _ in range(args.blocks):
                session.step()  # the first process has the same frames, and writes them
            return 0
        with VideoWriter(path, params.fps) as writer:
            for block in range(args.blocks):
                start = time.perf_counter()
                frames = session.step()
                seconds = time.perf_counter() - start
                writer.write(frames)
                digest.update(frames.tobytes())
                pace = f"{len(frames)} frames in {seconds:.2f} s, {len(frames) / seconds:.1f} frames/s"
                if not args.quiet:
                    print(f"block {block + 1} of {args.blocks}: {pace}", file=sys.stderr, flush=True)
            writer.finish(session.record(digest.hexdigest()))
    size = f"{params.height}x{params.width}, {session.frames} frames"
    generator.close()
    print(f"{path}  {size}, {session.blocks} blocks, seed {session.seed}")
    return 0
