"""Is this request one the model can serve? Asked before anything is loaded or computed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kinetoscope.core.errors import InputError, shown
from kinetoscope.core.spec import nearest
from kinetoscope.core.types import ExecutionArgs, ForwardBatch, SamplingParams
from kinetoscope.diffusion.guidance import Guidance
from kinetoscope.diffusion.solver import solver_names
from kinetoscope.pipelines.stages.base import Stage

MAX_STEPS = 1000
MAX_GUIDANCE = 100.0
MAX_SHIFT = 100.0
MAX_FPS = 240.0
MAX_SEED = 2**32 - 1
"""torch's CPU generator reads 32 bits of a seed: above, seeds would share the noise of smaller ones."""


@dataclass(frozen=True, slots=True)
class VideoGeometry:
    """How pixels become latents.

    Attributes:
        spatial: pixels per latent position, each way.
        temporal: frames per latent frame after the first.
        patch: latent positions per token (T, H, W).
        max_positions: tokens that position embeddings cover: of the longest axis, or of each (T, H, W).
    """

    spatial: int = 8
    temporal: int = 4
    patch: tuple[int, int, int] = (1, 2, 2)
    max_positions: int | tuple[int, int, int] = 1024

    @property
    def positions(self) -> tuple[int, int, int]:
        """Tokens that position embeddings cover, of each axis (T, H, W)."""
        most = self.max_positions
        return (most, most, most) if isinstance(most, int) else most

    @classmethod
    def of(
        cls,
        vae: Mapping[str, Any],
        patch: tuple[int, int, int],
        *,
        spatial: int = 8,
        temporal: int = 4,
        max_positions: int | tuple[int, int, int] = 1024,
    ) -> VideoGeometry:
        """With the factors of a VAE's published configuration under either of their names, or else those given."""
        given = {"spatial": spatial, "temporal": temporal}
        for axis, default in given.items():
            given[axis] = vae.get(f"scale_factor_{axis}", vae.get(f"{axis}_compression_ratio", default))
        return cls(given["spatial"], given["temporal"], patch, max_positions)

    def latent_size(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(T, H, W) of the latents."""
        return (num_frames - 1) // self.temporal + 1, height // self.spatial, width // self.spatial

    def tokens(self, num_frames: int, height: int, width: int) -> int:
        """Tokens of one row."""
        size = self.latent_size(num_frames, height, width)
        return math.prod(n // p for n, p in zip(size, self.patch, strict=True))

    def longest(self, num_frames: int) -> int:
        """Return the greatest number of frames that the model can make and that is at most `num_frames`."""
        step = self.temporal * self.patch[0]
        return 1 + step * min((num_frames - 1) // step, self.positions[0] - 1)

    def check(self, params: SamplingParams) -> None:
        """Refuse a size that does not divide into tokens; the message names the nearest sizes that do.

        Raises:
            InputError: size or frame count out of range or not a multiple.
        """
        for axis, name in ((1, "height"), (2, "width")):
            step = self.spatial * self.patch[axis]
            _check_grid(name, getattr(params, name), step, 0, step * self.positions[axis])
        step = self.temporal * self.patch[0]
        _check_grid("num_frames", params.num_frames, step, 1, step * (self.positions[0] - 1) + 1)

    def lowered(self, params: SamplingParams) -> SamplingParams:
        """Return `params` with height, width and frames lowered to the largest that the model can make.

        Both sides are lowered by the same factor, so that the picture keeps its shape to rounding.
        """
        steps = {"height": self.spatial * self.patch[1], "width": self.spatial * self.patch[2]}
        most = {name: steps[name] * self.positions[axis] for axis, name in ((1, "height"), (2, "width"))}
        given = {name: value for name in steps if (value := getattr(params, name))}
        factor = min([1.0, *(most[name] / value for name, value in given.items())])
        fitting = {name: max(int(value * factor) // steps[name], 1) * steps[name] for name, value in given.items()}
        if params.num_frames:
            fitting["num_frames"] = self.longest(params.num_frames)
        return replace(params, **fitting)


def _check_grid(name: str, value: int | None, step: int, offset: int, largest: int) -> None:
    """`value` must be offset + k * step, positive and at most `largest`."""
    smallest = offset or step
    rule = f"a multiple of {step}" if offset == 0 else f"{offset} + a multiple of {step}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{name}={shown(value)} is not a whole number; it must be {rule}")
    if not smallest <= value <= largest:
        raise InputError(f"{name}={shown(value)} is outside [{smallest}, {largest}]; it must be {rule}")
    if (value - offset) % step:
        below = value - (value - offset) % step
        near = [str(v) for v in (below, below + step) if smallest <= v <= largest]
        raise InputError(f"{name}={value} is not {rule}; nearest: {' or '.join(near)}")


def _check_number(name: str, value: object, low: float, high: float, *, whole: bool = False, hint: str = "") -> None:
    kind = int if whole else (int, float)
    if not isinstance(value, kind) or isinstance(value, bool) or value != value:
        raise InputError(f"{name}={shown(value)} is not a {'whole ' if whole else ''}number")
    if not low <= value <= high:
        raise InputError(f"{name}={shown(value)} is outside [{low:g}, {high:g}]{hint}")


def check_params(params: SamplingParams, geometry: VideoGeometry) -> None:
    """Refuse sampling parameters that no run could follow.

    Raises:
        InputError: names the field, its value and what it may be.
    """
    geometry.check(params)
    _check_number("num_inference_steps", params.num_inference_steps, 1, MAX_STEPS, whole=True)
    _check_number("guidance_scale", params.guidance_scale, 1, MAX_GUIDANCE, hint="; 1 switches guidance off")
    _check_number("guidance_rescale", 0.0 if params.guidance_rescale is None else params.guidance_rescale, 0, 1)
    if params.guidance is not None:
        if not isinstance(params.guidance, str):
            raise InputError(f"guidance={shown(params.guidance)} is not text such as 'cfg-zero' or 'apg:eta=0'")
        Guidance.make(2.0, 0.0, params.guidance)
    _check_number("fps", params.fps, 1, MAX_FPS)
    if params.guidance_scale_2 is not None:
        _check_number("guidance_scale_2", params.guidance_scale_2, 1, MAX_GUIDANCE, hint="; 1 switches guidance off")
    if params.strength is not None:
        _check_number("strength", params.strength, 0, 1)
    if params.flow_shift is not None:
        _check_number("flow_shift", params.flow_shift, 0.01, MAX_SHIFT)
    if params.scheduler is not None and params.scheduler not in solver_names():  # a list takes unhashable values
        near = nearest(params.scheduler, solver_names())
        hint = f"did you mean {near}? Known" if near else "known"
        raise InputError(f"unknown scheduler {shown(params.scheduler)}; {hint}: {', '.join(solver_names())}")


def check_text(prompt: object, seed: object, negative_prompt: object = "") -> None:
    """Refuse a prompt or seed of the wrong kind.

    Raises:
        InputError: a prompt is not text, the prompt is empty, or the seed is no integer in [0, 2**32).
    """
    for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        if not isinstance(text, str):
            raise InputError(f"{name}={shown(text)} is not text")
        if any("\ud800" <= c <= "\udfff" for c in text):  # what bytes of the command line become that are not UTF-8
            raise InputError(f"{name}={shown(text)} is not valid Unicode text; write it in UTF-8")
    assert isinstance(prompt, str)
    if not prompt.strip():
        raise InputError("the prompt is empty; describe the video in a sentence")
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= MAX_SEED:
        same = f"; seed={seed % 2**32} starts from the same noise" if type(seed) is int and seed > MAX_SEED else ""
        raise InputError(f"seed={shown(seed)} is not a whole number in [0, 2**32){same}")


class InputValidationStage(Stage):
    """Checks the whole request.

    Args:
        geometry: of the model.
        keeps_image: whether a given image is the first latent frame, which the model does not make.
    """

    optional = True

    def __init__(self, geometry: VideoGeometry, *, keeps_image: bool = False) -> None:
        self.geometry = geometry
        self.keeps_image = keeps_image

    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The same batch, or an `InputError`."""
        if not batch.prompts:
            raise InputError("the list of prompts is empty")
        if not batch.size == len(batch.seeds) == len(batch.negative_prompts):
            raise InputError(
                f"{batch.size} prompts, {len(batch.negative_prompts)} negative prompts and {len(batch.seeds)} seeds; "
                "there must be one of each for every video"
            )
        check_params(batch.params, self.geometry)
        for prompt, seed in zip(batch.prompts, batch.seeds, strict=True):
            check_text(prompt, seed)
        if self.keeps_image and batch.image is not None and batch.params.num_frames == 1:
            least = 1 + self.geometry.temporal
            raise InputError(f"num_frames=1 are the image alone; ask for {least} or more")
        return batch
