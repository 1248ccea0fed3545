"""A request for videos: its fields, checked and spread over the videos it asks for."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from kinetoscope.core.errors import InputError, shown
from kinetoscope.core.spec import nearest
from kinetoscope.core.types import SamplingParams
from kinetoscope.engine.hooks import Hook, StepTraceHook
from kinetoscope.media import Array, Clip, Picture, fit_picture, load_frames, load_picture
from kinetoscope.pipelines.stages.validation import VideoGeometry, check_params, check_text
from kinetoscope.runtime.output_names import output_paths

logger = logging.getLogger(__name__)
T = TypeVar("T", str, int)
DEFAULT_STRENGTH = 0.8
"""How much of a given video is noised unless the request says otherwise, as in diffusers' video-to-video pipelines."""
MAX_GIVEN = 4096
"""Frames of a video to continue that are read at most."""
_SAMPLING = ("height", "width", "num_frames", "fps", "num_inference_steps", "guidance_scale", "guidance_rescale",
             "guidance", "flow_shift", "scheduler")  # fmt: skip


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
    guidance: str | None = None
    flow_shift: float | None = None
    scheduler: str | None = None
    trace: bool = False
    hooks: Sequence[Hook] = ()
    batch_size: int | None = None
    image: Picture | Sequence[Picture] | None = None
    last_image: Picture | Sequence[Picture] | None = None
    video: Clip | None = None
    strength: float | None = None
    guidance_scale_2: float | None = None
    preview: bool | str | Path = False
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def plan(
        self,
        defaults: SamplingParams,
        geometry: VideoGeometry,
        inputs: Mapping[str, bool] | None = None,
        extra_defaults: Mapping[str, Any] | None = None,
        *,
        continues: bool = False,
        follows: bool = False,
    ) -> VideoPlan:
        """Return what to make, fully resolved and checked.

        The length of a given video that is not continued is the default of `num_frames`: the nearest length that the
        model can make and that is at most the video's own.

        Args:
            defaults: of the model.
            geometry: of the model.
            inputs: what the model takes beside the prompt, and whether it must be given.
            extra_defaults: the family's own parameters with their defaults.
            continues: a given video is carried on, so its end is read; else it is the start that is noised by
                `strength`, and `num_frames` of it are read.
            follows: a given video is neither: it says frame by frame what to make, and `num_frames` of it are read.

        Raises:
            InputError: a field is out of range or of the wrong kind.
            OutputError: an output path cannot be written.
        """
        params = self._params(defaults, inputs or {}, extra_defaults or {}, kept=continues or follows)
        check_params(params, geometry)
        one = isinstance(self.prompt, str)
        if not isinstance(self.prompt, (str, list, tuple)):
            raise InputError(f"prompt={shown(self.prompt)} is neither text nor a list of texts")
        prompts = [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)
        if not prompts:
            raise InputError("the list of prompts is empty")
        negative = self.negative_prompt if self.negative_prompt is not None else params.negative_prompt or ""
        seeds = _one_each("seed", self.seed, len(prompts))
        negatives = _one_each("negative_prompt", negative, len(prompts))
        for prompt, unwanted, seed in zip(prompts, negatives, seeds, strict=True):
            check_text(prompt, seed, unwanted)
        size = _plain(self.batch_size)
        if size is not None and not (type(size) is int and size > 0):
            raise InputError(f"batch_size={shown(self.batch_size)} is not a positive whole number")
        self._check_inputs(inputs or {})
        paths = output_paths(self.output_path, prompts, seeds, one=one)
        video = None
        if self.video is not None and continues:
            video = _end_of(self.video, params)
        elif self.video is not None:
            video, length = _start_of(self.video, params, geometry if self.num_frames is None else None)
            params = replace(params, num_frames=length)
        return VideoPlan(
            params,
            prompts,
            negatives,
            seeds,
            _with_batch(self.latents, len(prompts)),
            paths,
            [*self.hooks, *([StepTraceHook()] if self.trace else [])],
            _pictures("image", self.image, len(prompts), params),
            _pictures("last_image", self.last_image, len(prompts), params),
            None if video is None else video.expand(len(prompts), -1, -1, -1, -1),
        )

    def _params(
        self, defaults: SamplingParams, inputs: Mapping[str, bool], extra_defaults: Mapping[str, Any], *, kept: bool
    ) -> SamplingParams:
        """Return the sampling parameters over the model's defaults; numbers of numpy become Python's."""
        given = {name: _plain(getattr(self, name)) for name in _SAMPLING}
        params = SamplingParams(
            **given,
            guidance_scale_2=self._second_scale(defaults),
            strength=self._strength(inputs, kept),
            extra=_known_extra(self.extra, extra_defaults),
        ).over(defaults)
        if extra_defaults:  # below what the model's own defaults say
            params = params.over(SamplingParams(extra=dict(extra_defaults)))
            _check_switches(params.extra or {}, extra_defaults)
        return params

    def given(self) -> dict[str, Any]:
        """Return the settings by name, with the parameters of the family; None where the request leaves one out."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"} | dict(self.extra)

    def _second_scale(self, defaults: SamplingParams) -> float | None:
        """Of a second expert: as given, else as the given first."""
        if defaults.guidance_scale_2 is None and self.guidance_scale_2 is not None:
            raise InputError("guidance_scale_2 is for models with two transformers; this one has one")
        if defaults.guidance_scale_2 is not None and self.guidance_scale_2 is None:
            return self.guidance_scale
        return self.guidance_scale_2

    def _strength(self, inputs: Mapping[str, bool], kept: bool) -> float | None:
        """Of a video to start from; without one there is nothing that it could mean."""
        if self.strength is not None and (self.video is None or kept):
            why = "this model continues or follows videos" if kept else "give video="
            if "video" not in inputs:
                why = "this model takes no video"
            raise InputError(f"strength={self.strength} without a video to start from; {why}")
        if kept:
            return None
        return DEFAULT_STRENGTH if self.video is not None and self.strength is None else self.strength

    def _check_inputs(self, inputs: Mapping[str, bool]) -> None:
        """Refuse an image or video that the model does not read, or the lack of one that it needs."""
        for name in ("image", "last_image", "video"):
            given = getattr(self, name) is not None
            if given and name not in inputs:
                takes = ", ".join(inputs) or "only a prompt"
                raise InputError(f"this model takes no {name}; it takes {takes}")
            if not given and inputs.get(name):
                raise InputError(f"this model needs {name}=; give a path, a PIL image or an array")
        if self.last_image is not None and self.image is None:
            raise InputError("last_image without image; give both")


@dataclass(frozen=True, slots=True)
class VideoPlan:
    """A request, resolved: lists have one entry a video.

    Attributes:
        latents: [B, C, T, H, W] starting noise given by the caller, or None.
        image, last_image: [B, 3, H, W] float32 in [-1, 1] at the request's size, or None.
        video: [B, 3, T, H, W] float32 in [-1, 1], or None.
    """

    params: SamplingParams
    prompts: list[str]
    negative_prompts: list[str]
    seeds: list[int]
    latents: Tensor | None
    paths: list[Path | None]
    hooks: list[Hook]
    image: Tensor | None = None
    last_image: Tensor | None = None
    video: Tensor | None = None

    def given(self) -> dict[str, Tensor]:
        """What came from outside, by name; a replay record can name but not hold it."""
        parts = {"latents": self.latents, "image": self.image, "last_image": self.last_image, "video": self.video}
        return {k: v for k, v in parts.items() if v is not None}


def _known_extra(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any] | None:
    """The family's own parameters that are given; None where there are none."""
    for name in given:
        if name not in defaults:
            near = nearest(name, [*defaults, *VideoRequest.__dataclass_fields__])
            hint = f"; did you mean {near}?" if near else "."
            raise InputError(f"unknown parameter {name!r}{hint} This model's own: {', '.join(defaults) or 'none'}")
    return {k: v for k, v in given.items() if v is not None} or None


def _check_switches(extra: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse what is neither true nor false where a family's parameter is one of them: any text would be true."""
    for name, default in defaults.items():
        if type(default) is bool and type(extra.get(name)) is not bool:
            raise InputError(f"{name}={shown(extra.get(name))} is neither true nor false")


def _to_tensor(frames: list[Array]) -> Tensor:
    """uint8 arrays [H, W, 3] -> [N, 3, H, W] float32 in [-1, 1]."""
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _pictures(
    name: str, value: Picture | Sequence[Picture] | None, count: int, params: SamplingParams
) -> Tensor | None:
    """[B, 3, H, W] in [-1, 1] at the request's size: one picture for all prompts, or one each."""
    if value is None:
        return None
    sources = cast("list[Picture]", list(value) if isinstance(value, (list, tuple)) else [value])
    if len(sources) not in (1, count):
        raise InputError(f"{count} prompts but {len(sources)} values for {name}; give one for all or one each")
    assert params.height and params.width
    fitted = [fit_picture(load_picture(s), params.height, params.width) for s in sources]
    return _to_tensor(fitted * (count // len(fitted)))


def _start_of(value: Clip, params: SamplingParams, geometry: VideoGeometry | None) -> tuple[Tensor, int]:
    """Return the beginning of a video, [1, 3, T, H, W] in [-1, 1] at the request's size and rate, and T.

    Args:
        value: the video.
        params: of the request; T is its `num_frames`.
        geometry: of the model, where T is to be the nearest length that is at most the video's own.
    """
    assert params.height and params.width and params.num_frames and params.fps
    limit = None if geometry else params.num_frames
    frames = load_frames(value, params.height, params.width, fps=params.fps, limit=limit)
    length = geometry.longest(len(frames)) if geometry else params.num_frames
    if len(frames) < length:
        raise InputError(
            f"the video has {len(frames)} frames and num_frames={length} are asked for; leave num_frames out to take "
            "as many as the video has"
        )
    if length != params.num_frames:
        logger.info(
            "num_frames=%d: the given video has %d frames at %g a second; give num_frames= for another length",
            length, len(frames), params.fps,
        )  # fmt: skip
    return _to_tensor(frames[:length]).transpose(0, 1).unsqueeze(0), length


def _end_of(value: Clip, params: SamplingParams) -> Tensor:
    """Return the end of a video to continue, [1, 3, T, H, W] in [-1, 1] at the request's size and rate: as many frames
    as a model may be given, which is less than it makes or what a parameter of its family says."""
    assert params.height and params.width and params.num_frames and params.fps
    last = max([params.num_frames, *(v for v in (params.extra or {}).values() if type(v) is int)])
    frames = load_frames(value, params.height, params.width, fps=params.fps, last=min(last, MAX_GIVEN))
    return _to_tensor(frames).transpose(0, 1).unsqueeze(0)


def _plain(value: Any) -> Any:
    """Return numbers of numpy as Python's, also in a list; anything else as it is."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.ndim == 1:
        return value.tolist()
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _one_each(name: str, value: T | Sequence[T], count: int) -> list[T]:
    value = _plain(value)
    if isinstance(value, (str, int)):
        return cast(list[T], [value] * count)
    if not isinstance(value, Sequence):
        raise InputError(f"{name}={shown(value)} is neither one value nor a list of them")
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
