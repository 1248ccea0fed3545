"""A request for videos: its fields, checked and spread over the videos it asks for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

from torch import Tensor

from kinetoscope.core.errors import InputError
from kinetoscope.core.types import SamplingParams
from kinetoscope.engine.hooks import Hook, StepTraceHook
from kinetoscope.media import check_output
from kinetoscope.pipelines.stages.validation import VideoGeometry, check_params, check_text

T = TypeVar("T", str, int)


@dataclass(frozen=True, slots=True)
class VideoRequest:
    """The fields of `VideoGenerator.generate_video`, where they are described."""

    prompt: str | Sequence[str]
    negative_prompt: str | Sequence[str] | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: float | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int | Sequence[int] = 0
    latents: Tensor | None = None
    output_path: str | Path | Sequence[str | Path] | None = None
    guidance_rescale: float | None = None
    flow_shift: float | None = None
    scheduler: str | None = None
    trace: bool = False
    hooks: Sequence[Hook] = ()
    batch_size: int | None = None

    def plan(self, defaults: SamplingParams, geometry: VideoGeometry) -> VideoPlan:
        """What to make, fully resolved and checked.

        Raises:
            InputError: a field is out of range or of the wrong kind.
            OutputError: an output path cannot be written.
        """
        params = SamplingParams(
            height=self.height,
            width=self.width,
            num_frames=self.num_frames,
            fps=self.fps,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            guidance_rescale=self.guidance_rescale,
            flow_shift=self.flow_shift,
            scheduler=self.scheduler,
        ).over(defaults)
        check_params(params, geometry)
        one = isinstance(self.prompt, str)
        if not isinstance(self.prompt, (str, list, tuple)):
            raise InputError(f"prompt={self.prompt!r} is neither text nor a list of texts")
        prompts = [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)
        if not prompts:
            raise InputError("the list of prompts is empty")
        negative = self.negative_prompt if self.negative_prompt is not None else params.negative_prompt or ""
        seeds = _one_each("seed", self.seed, len(prompts))
        negatives = _one_each("negative_prompt", negative, len(prompts))
        for prompt, unwanted, seed in zip(prompts, negatives, seeds, strict=True):
            check_text(prompt, seed, unwanted)
        if self.batch_size is not None and not (type(self.batch_size) is int and self.batch_size > 0):
            raise InputError(f"batch_size={self.batch_size!r} is not a positive whole number")
        return VideoPlan(
            params,
            prompts,
            negatives,
            seeds,
            _with_batch(self.latents, len(prompts)),
            output_paths(self.output_path, prompts, seeds, one=one),
            [*self.hooks, *([StepTraceHook()] if self.trace else [])],
        )


@dataclass(frozen=True, slots=True)
class VideoPlan:
    """A request, resolved: lists have one entry a video.

    Attributes:
        latents: [B, C, T, H, W] starting noise given by the caller, or None.
    """

    params: SamplingParams
    prompts: list[str]
    negative_prompts: list[str]
    seeds: list[int]
    latents: Tensor | None
    paths: list[Path | None]
    hooks: list[Hook]


def _one_each(name: str, value: T | Sequence[T], count: int) -> list[T]:
    if isinstance(value, (str, int)):
        return cast(list[T], [value] * count)
    if not isinstance(value, Sequence):
        raise InputError(f"{name}={value!r} is neither one value nor a list of them")
    if len(value) != count:
        raise InputError(f"{count} prompts but {len(value)} values for {name}; give one for all or one each")
    return list(value)


def _with_batch(latents: Tensor | None, count: int) -> Tensor | None:
    if latents is None:
        return None
    if not isinstance(latents, Tensor):
        raise InputError(f"latents are a {type(latents).__name__}, not a tensor")
    latents = latents.unsqueeze(0) if latents.ndim == 4 else latents
    if latents.ndim != 5 or len(latents) != count:
        raise InputError(
            f"latents have shape {tuple(latents.shape)} for {count} prompts; "
            "give [C, T, H, W] for one prompt or [B, C, T, H, W]"
        )
    return latents


def slug(prompt: str, limit: int = 48) -> str:
    """A file name made of the prompt's letters and digits, whole words up to `limit` characters."""
    name = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    if len(name) > limit:
        name = name[: limit + 1].rpartition("-")[0] or name[:limit]
    return name or "video"


def output_paths(
    output: str | Path | Sequence[str | Path] | None,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    one: bool,
) -> list[Path | None]:
    """Where each video goes; None for those that are not written.

    Args:
        output: a file (with a suffix, for `one` video), a directory, or one path each.
        one: whether a single video was asked for, not a list of one.

    Raises:
        InputError: a list of paths of the wrong length, or the same file twice.
        OutputError: a path cannot be written.
    """
    if output is None:
        return [None] * len(prompts)
    if isinstance(output, (str, Path)):
        if one and Path(output).suffix:
            paths = [Path(output)]
        elif Path(output).suffix and not Path(output).is_dir():
            raise InputError(f"output {output} is one file for {len(prompts)} videos; give a directory")
        else:
            names = [f"{slug(p)}-{s}" for p, s in zip(prompts, seeds, strict=True)]
            if not one:
                names = [f"{i:0{len(str(len(prompts) - 1))}d}-{n}" for i, n in enumerate(names)]
            paths = [Path(output) / f"{n}.mp4" for n in names]
    elif isinstance(output, (list, tuple)) and all(isinstance(p, (str, Path)) for p in output):
        paths = [Path(p) for p in output]
    else:
        raise InputError(f"output_path={output!r} is neither a path nor a list of paths")
    if len(paths) != len(prompts):
        raise InputError(f"{len(prompts)} prompts but {len(paths)} output paths")
    if len(set(paths)) != len(paths):
        raise InputError("two videos would be written to the same file")
    for path in paths:
        check_output(path)
    return list(paths)
