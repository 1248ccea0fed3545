"""Options that several commands share."""

from __future__ import annotations

import argparse
import re
from typing import Any

import yaml

from kinetoscope.core.errors import InputError, shown
from kinetoscope.core.files import read_text

DEFAULT_MODEL = "tiny-t2v"


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) from "HEIGHTxWIDTH", the order of tensors and of the Python API."""
    height, x, width = text.lower().partition("x")
    if not (x and re.fullmatch(r"[0-9]{1,9}", width) and re.fullmatch(r"[0-9]{1,9}", height)):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, for instance 480x832")
    return int(height), int(width)


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Refuse a number of the command line outside [low, high], such as not-a-number.

    Raises:
        InputError: names the option, its value and what it may be.
    """
    if not low <= value <= high:
        raise InputError(f"--{name}={shown(value)} is outside [{low}, {high}]")


def add_video_options(parser: argparse.ArgumentParser) -> None:
    """Size, frames, steps, guidance and schedule."""
    group = parser.add_argument_group("video (defaults come from the model)")
    group.add_argument("--size", type=parse_size, metavar="HxW", help="height x width in pixels, for instance 480x832")
    group.add_argument("--frames", type=int, metavar="N", help="number of frames")
    group.add_argument("--steps", type=int, metavar="N", help="denoising steps")
    group.add_argument("--guidance-scale", type=float, metavar="W", help="classifier-free guidance; 1 is off")
    group.add_argument("--guidance", metavar="SPEC", help="kind of guidance: cfg, cfg-zero, apg, cfg:reuse=0.5, ...")
    group.add_argument("--guidance-rescale", type=float, metavar="PHI", help="of arXiv 2305.08891, in [0, 1]")
    group.add_argument("--guidance-scale-2", type=float, metavar="W", help="of the low-noise expert (Wan 2.2)")
    group.add_argument("--flow-shift", type=float, metavar="S", help="shift of the noise schedule")
    group.add_argument("--scheduler", metavar="NAME", help="solver: unipc, euler, dpm++, heun, or a registered one")


def video_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `generate_video` that `add_video_options` gave."""
    height, width = args.size or (None, None)
    return {
        "height": height,
        "width": width,
        "num_frames": args.frames,
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "guidance": args.guidance,
        "guidance_rescale": args.guidance_rescale,
        "guidance_scale_2": args.guidance_scale_2,
        "flow_shift": args.flow_shift,
        "scheduler": args.scheduler,
    }


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """Images, videos and what a family adds."""
    group = parser.add_argument_group("inputs (for models that take them)")
    group.add_argument("--image", metavar="FILE", help="first picture, a file or an http(s) address")
    group.add_argument("--last-image", metavar="FILE", help="last picture")
    group.add_argument("--video", metavar="FILE", help="video to start from or to continue")
    group.add_argument("--strength", type=float, metavar="X", help="how much of the video is noised, in (0, 1]")
    group.add_argument("--actions", metavar="FILE", help="action script (JSON) for world models")
    group.add_argument(
        "--set", dest="extra", action="append", default=[], metavar="NAME=VALUE",
        help="a parameter of the model's family by its published name, for instance num_cond_frames=13 (repeatable)",
    )  # fmt: skip


def input_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `generate_video` that `add_input_options` gave.

    Raises:
        InputError: a --set that is not NAME=VALUE, or names what is no family's own.
    """
    from kinetoscope.runtime.request import VideoRequest  # not at the top: --help needs no torch

    common = {*VideoRequest.__dataclass_fields__, "on_event", "blocks"}
    names = ("image", "last_image", "video", "strength", "actions")
    given: dict[str, Any] = {n: v for n in names if (v := getattr(args, n)) is not None}
    for text in args.extra:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"--set {text!r} is not of the form NAME=VALUE")
        if name in common:
            raise InputError(f"--set {text!r}: {name} is of every request; it has its own option or none (see --help)")
        try:
            given[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"--set {text!r}: the value cannot be read") from error
    return given


def add_compute_options(parser: argparse.ArgumentParser) -> None:
    """Where and how to compute."""
    group = parser.add_argument_group("computing")
    group.add_argument("--device", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    group.add_argument("--dtype", help="auto, float32, bfloat16, float16 (default: auto)")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    group.add_argument(
        "--attention", metavar="SPEC",
        help="attention backend or sparse kind, see `kinetoscope doctor` and docs/attention.md: sdpa, "
        "vsa:sparsity=0.8, 'self=flash2;cross=sdpa' (default: KINETOSCOPE_ATTENTION, else auto)",
    )  # fmt: skip
    group.add_argument("--cfg", help="guidance branches: auto, sequential or batched (default: auto)")
    group.add_argument(
        "--text-mode",
        metavar="MODE",
        help="padded or true_length: whether padding of the prompt is read (default: as trained)",
    )
    group.add_argument(
        "--cache", metavar="SPEC", help="a step cache, for instance fbcache:threshold=0.05 (see docs/caches.md)"
    )
    group.add_argument("--compile", action="store_true", help="compile the transformer's blocks (slow first step)")
    group.add_argument("--compile-mode", metavar="MODE", help="default, reduce-overhead or max-autotune")
    group.add_argument(
        "--quantize", metavar="KIND", help="8-bit weights: int8, int8-dynamic, fp8 or fp8-dynamic (lossy)"
    )
    group.add_argument(
        "--offload", metavar="KIND", help="weights that are not used rest on the host: components, blocks"
    )
    group.add_argument("--vae", metavar="MODE", help="decoding: whole (default), streaming or tiled (lossy)")
    group.add_argument(
        "--lora", action="append", metavar="FILE[:WEIGHT]",
        help="a LoRA file (repeatable); for models with two transformers transformer=FILE, transformer_2=FILE or "
        "both=FILE, where the file does not say it",
    )  # fmt: skip
    group.add_argument("--perf-logging", action="store_true", default=None, help="log the time of every step")


def compute_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of `from_pretrained` that `add_compute_options` gave; those that are left out are not in it."""
    names = ("device", "dtype", "threads", "attention", "cfg", "text_mode", "cache", "compile", "lora", "perf_logging")
    memory = ("quantize", "offload", "vae")
    given = {name: getattr(args, name) for name in (*names, *memory)} | {"compile": args.compile_mode or args.compile}
    return {name: value for name, value in given.items() if value is not None and value is not False}


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """How many devices, and what runs them."""
    group = parser.add_argument_group("devices (see docs/parallel.md)")
    group.add_argument("--parallel", metavar="LAYOUT", help="ulysses=2,cfg=2, ...; auto chooses for this machine")
    group.add_argument(
        "--executor", metavar="SPEC",
        help="in-process, processes, torchrun or ray, perhaps with settings: processes:timeout=900",
    )  # fmt: skip


def device_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of `from_pretrained` that `add_device_options` gave."""
    parallel = args.parallel
    if parallel == "auto":  # for the video that is asked for
        size, frames = getattr(args, "size", None), getattr(args, "frames", None)
        wanted = ([f"size={size[0]}x{size[1]}"] if size else []) + ([f"frames={frames}"] if frames else [])
        parallel += ":" + ",".join(wanted) if wanted else ""
    return {"parallel": parallel, "executor": args.executor}


def add_quiet_option(parser: argparse.ArgumentParser) -> None:
    """Nothing on stderr but errors."""
    parser.add_argument("--quiet", "-q", action="store_true", help="no progress and no notes on stderr, only errors")


def read_prompts(path: str) -> list[str]:
    """The lines of a file that are not empty.

    Raises:
        InputError: the file cannot be read, is not UTF-8 text, or has no prompt.
    """
    prompts = [line.strip() for line in read_text(path, what="prompts file").split("\n") if line.strip()]
    if not prompts:
        raise InputError(f"prompts file {path} holds no prompt; write one a line")
    return prompts
