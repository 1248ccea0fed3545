"""Preview maps: fitting one for a VAE, keeping it beside the model, and finding it again."""

from __future__ import annotations

import hashlib
import json
import math
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from kinetoscope.core.errors import CompositionError, InputError, ModelLoadError
from kinetoscope.core.files import read_text
from kinetoscope.core.types import ForwardBatch
from kinetoscope.engine.hooks.preview import Preview, PreviewHook, PreviewMap
from kinetoscope.loading import ModelDir
from kinetoscope.media import Array, load_frames
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.pipelines.stages.images import encode_video

FILE = "latent_preview.json"
FORMAT = 1
HELD_OUT = 4
"""Of so many clips one is not fitted to but scored on."""

T = TypeVar("T")
Sample = tuple[Tensor, Array]
"""Normalised latents [C, t, h, w], and the frames uint8 [T, H, W, 3] they stand for."""


@dataclass(frozen=True, slots=True, eq=False)
class PreviewEvent:
    """A preview among the events of a generator.

    Attributes:
        preview: frames uint8 [B, t, h, w, 3] of the B videos of a run, and the step they are of.
        videos: indices of these B videos among those of the request.
        kind: "preview".
    """

    preview: Preview
    videos: tuple[int, ...] = ()
    kind: str = "preview"

    @property
    def first(self) -> int:
        """Return the index of the first of these videos among those of the request."""
        return self.videos[0] if self.videos else 0


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """A fitted map.

    Attributes:
        preview_map: the map.
        psnr: of small frames of clips that were not fitted to, in dB against the clips averaged down to that size.
        clips: fitted to, and scored on.
    """

    preview_map: PreviewMap
    psnr: float
    clips: tuple[int, int]


# -- fitting ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Equations:
    """Normal equations of the least squares, so that clips need not be kept."""

    gram: Tensor
    moment: Tensor

    @staticmethod
    def empty(channels: int) -> _Equations:
        size = channels + 1
        return _Equations(torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, 3, dtype=torch.float64))

    def add(self, x: Tensor, y: Tensor) -> None:
        ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
        self.gram += ones.T @ ones
        self.moment += ones.T @ y

    def solve(self) -> PreviewMap:
        # by the pseudo-inverse: channels that never vary, or vary together, get the smallest weights that serve
        solution = torch.linalg.pinv(self.gram, hermitian=True) @ self.moment
        return PreviewMap(solution[:-1].T.float().contiguous(), solution[-1].float())


def fit_preview(samples: Iterable[Sample], temporal: int) -> Fit:
    """The map from latents to colours with the least squared error.

    A latent position stands for a block of pixels of the frames that its latent frame holds; the colour fitted to is
    their mean.

    Args:
        samples: at least two.
        temporal: frames of a latent frame; the first holds one.

    Raises:
        InputError: fewer samples, or frames that are no whole blocks of the latents.
    """
    equations: _Equations | None = None
    scored: list[tuple[Tensor, Tensor]] = []
    fitted = 0
    for index, (latents, frames) in enumerate(samples):
        x = latents.double().flatten(1).T.cpu()  # [t h w, C]
        y = small_colours(frames, tuple(latents.shape[1:]), temporal).flatten(1).T
        equations = equations or _Equations.empty(x.shape[1])
        if index % HELD_OUT == 1:
            scored.append((x, y))
        else:
            fitted += 1
            equations.add(x, y)
    if equations is None or not scored:
        raise InputError("a preview map needs at least two clips: one to fit and one to score")
    found = equations.solve()
    x, y = (torch.cat(parts) for parts in zip(*scored, strict=True))
    error = (x @ found.weight.double().T + found.bias.double()).clamp(-1, 1).sub(y).square().mean().item()
    return Fit(found, math.inf if error == 0 else 10 * math.log10(4 / error), (fitted, len(scored)))


def small_colours(frames: Array, size: Sequence[int], temporal: int) -> Tensor:
    """Mean colours [3, t, h, w] float64 in [-1, 1] of the pixels that each latent position stands for.

    Args:
        frames: uint8 [T, H, W, 3].
        size: (t, h, w) of the latents.
        temporal: frames of a latent frame; the first holds one.

    Raises:
        InputError: the frames are no whole blocks.
    """
    t, h, w = size
    if len(frames) != 1 + temporal * (t - 1) or frames.shape[1] % h or frames.shape[2] % w:
        raise InputError(f"frames {list(frames.shape[:3])} are no whole blocks of latents {[t, h, w]}")
    video = torch.from_numpy(np.ascontiguousarray(frames)).double() / 127.5 - 1
    video = video.unflatten(2, (w, -1)).unflatten(1, (h, -1)).mean((2, 4))  # [T, h, w, 3]
    parts = [video[:1]]
    if t > 1:
        parts.append(video[1:].unflatten(0, (t - 1, temporal)).mean(1))
    return torch.cat(parts).permute(3, 0, 1, 2)


def encoded(pipeline: ComposedPipeline, clips: Iterable[Array]) -> Iterator[Sample]:
    """Clips uint8 [T, H, W, 3] with their latents.

    Raises:
        CompositionError: the VAE keeps its normalisation elsewhere than in `latents_mean` and `latents_std`.
    """
    vae = pipeline.get_module("vae")
    if getattr(vae.config, "latents_mean", None) is None or getattr(vae.config, "scaling_factor", None) is not None:
        raise CompositionError(
            f"clips cannot be encoded for {type(vae).__name__} here; fit on videos that the model makes (--prompt)"
        )
    device = pipeline.args.device
    parameter = next(vae.parameters())
    for clip in clips:
        video = torch.from_numpy(np.ascontiguousarray(clip)).permute(3, 0, 1, 2).unsqueeze(0)
        with torch.no_grad():
            latents = encode_video(vae, (video.float() / 127.5 - 1).to(device, parameter.dtype))
        yield latents[0].cpu(), clip


def clips_of(folder: Path, geometry: Any, height: int, width: int, num_frames: int) -> Iterator[Array]:
    """The beginnings of the videos of a folder, at a size; those that are shorter give what fits the model.

    Raises:
        InputError: the folder has no videos, or one cannot be read.
    """
    files = sorted(folder.glob("*.mp4")) if folder.is_dir() else []
    if not files:
        raise InputError(f"{folder} holds no .mp4 files")
    for file in files:
        frames = load_frames(file, height, width, limit=num_frames)
        yield np.stack(frames[: 1 + (len(frames) - 1) // geometry.temporal * geometry.temporal])


# -- files ------------------------------------------------------------------------------------------------------------


def as_json(fit: Fit, model: ModelDir, command: str) -> str:
    """A map as the text of its file, with what it was fitted for and how."""
    record = {
        "format": FORMAT,
        "command": command,
        "vae_sha256": vae_hash(model),
        "clips": {"fitted": fit.clips[0], "scored": fit.clips[1]},
        "psnr_db": round(fit.psnr, 3) if math.isfinite(fit.psnr) else None,
        "weight": [[round(v, 6) for v in row] for row in fit.preview_map.weight.tolist()],
        "bias": [round(v, 6) for v in fit.preview_map.bias.tolist()],
    }
    return json.dumps(record, indent=1) + "\n"


def load_preview_map(model: ModelDir, path: Path | None = None) -> PreviewMap:
    """The map of a model: of the file, or the one beside the model.

    Raises:
        ModelLoadError: there is none, it is no map, or it was fitted for another VAE.
    """
    file = path or model.path / FILE
    how = f"fit one with `kinetoscope fit-preview {model.name}`"
    try:
        record = json.loads(read_text(file, ModelLoadError, "preview map"))
    except ModelLoadError as error:
        raise ModelLoadError(f"{error}; {how}") from error
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{file} is not valid JSON: {error}; {how}") from error
    try:
        if record["format"] != FORMAT:
            raise ValueError(record["format"])
        weight = torch.tensor(record["weight"], dtype=torch.float32)
        bias = torch.tensor(record["bias"], dtype=torch.float32)
        if weight.ndim != 2 or weight.shape[0] != 3 or bias.shape != (3,) or not torch.isfinite(weight).all():
            raise ValueError(tuple(weight.shape))
        made_for = record["vae_sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise ModelLoadError(f"{file} is no preview map ({error}); {how}") from error
    if made_for != vae_hash(model):
        raise ModelLoadError(f"{file} was fitted for another VAE than that of {model.name}; {how}")
    return PreviewMap(weight, bias)


def vae_hash(model: ModelDir) -> str:
    """SHA-256 (hex) of the VAE's configuration and weights."""
    files = sorted([model.config_file("vae"), *model.folder("vae").glob("*.safetensors")])
    return _digest(tuple((f, f.stat().st_size, f.stat().st_mtime_ns) for f in files))


@lru_cache(maxsize=8)
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Size and time are part of the key, so that a changed file is read again."""
    total = hashlib.sha256()
    for file, _, _ in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                total.update(chunk)
    return total.hexdigest()


# -- among the events of a run ----------------------------------------------------------------------------------------


class Previews:
    """The previews of one request: its hook puts them here, and its events take them.

    Args:
        preview_map: of the model.
    """

    def __init__(self, preview_map: PreviewMap) -> None:
        self._waiting: deque[PreviewEvent] = deque()
        self.hook = PreviewHook(preview_map, self._add)

    def among(self, events: Generator[Any, None, T]) -> Generator[Any, None, T]:
        """Yield the events of runs with their previews, each after the step it is of."""
        try:
            while True:
                try:
                    event = next(events)
                except StopIteration as stop:
                    return stop.value
                yield event
                while self._waiting:
                    yield self._waiting.popleft()
        finally:
            events.close()

    def _add(self, preview: Preview, batch: ForwardBatch) -> None:
        """Keep a preview until the events take it."""
        self._waiting.append(PreviewEvent(preview, batch.videos))
