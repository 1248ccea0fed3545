"""Batches of a world that is played: clips as latents, what was done in them, and what is told of their first views."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from kinetoscope.core.errors import ConfigError
from kinetoscope.core.file_lock import file_lock
from kinetoscope.core.files import replacing
from kinetoscope.train.batch import TrainBatch
from kinetoscope.train.data import SourceContext
from kinetoscope.train.data.worlds import WorldData, kept_under, latent_encoder, latent_size
from kinetoscope.train.flow import BATCH
from kinetoscope.train.plugins.matrix_game import first_view
from kinetoscope.train.recipe import Positive
from kinetoscope.train.run_inputs import sampled_digest
from kinetoscope.train.vae import Clips, to_video

Arrays = dict[str, np.ndarray[Any, Any]]


class PlayedData(WorldData):
    """Settings of `PlayedSource`; those of `WorldData`, and:

    Attributes:
        settled: latent frames after which the condition of a first view is taken to stay as it is: the encoder of a
            video VAE forgets a view in a few. Exact is as many as the clips have.
    """

    settled: Positive = Field(default=5)


class PlayedSource:
    """Clips of a world with actions, in the terms of a Matrix-Game model (`train.plugins.matrix_game`).

    All clips lie in one file of the cache, which is made where there is none, and in memory.

    Raises:
        ConfigError: nothing is done in the world's clips, latents are not wanted, or see `latent_size`.
    """

    settings_class: ClassVar[type[PlayedData]] = PlayedData

    def __init__(self, settings: PlayedData, context: SourceContext) -> None:
        if settings.latents == "none":
            raise ConfigError("data.latents=none: played clips are trained on; use encoder or basis")
        self.settings, opened = settings, context.opened
        self.encode = opened.encoder()
        self.frames = latent_size(settings, opened)[0]
        self.known = min(settings.settled, self.frames)
        vae = opened.pipeline.get_module("vae")
        encoders = (vae.encoder, vae.quant_conv, opened.pipeline.get_module("image_encoder"))
        told_by = [_digest(encoder) for encoder in encoders]
        path = kept_under(settings, opened, told_by=told_by, known=self.known).with_suffix(".npz")
        self._path = path
        if Clips(settings.world).sample(0).actions is None:
            raise ConfigError(f"data.world: nothing is done in clips of {settings.world.name}; use a played world")
        if not path.exists():
            with file_lock(path):
                if not path.exists():
                    _save(path, self._make(context))
        with np.load(path) as kept:
            self.arrays: Arrays = dict(kept)

    def inputs(self) -> dict[str, str]:
        """Return the digest of the file of clips."""
        return {"data clips": sampled_digest(self._path)}

    def batch(self, step: int, generator: torch.Generator) -> TrainBatch:
        """Random clips."""
        picked = torch.randint(0, self.settings.clips, (self.settings.batch,), generator=generator).numpy()
        part = {k: torch.from_numpy(v[picked].astype(np.float32)) for k, v in self.arrays.items()}
        latents = part.pop("latents")[:, :, : self.frames]
        part["condition"] = lengthened(part["condition"], self.frames)
        pixels = self.settings.frames or self.settings.world.num_frames
        acted = {name: part[name][:, :pixels] for name in ("keyboard", "mouse")}
        return TrainBatch(latents, self.encode([""] * len(picked)), extra={**part, **acted})

    def _make(self, context: SourceContext) -> Arrays:
        """All clips: latents and what is told of first views in float16, actions in float32."""
        settings, opened = self.settings, context.opened
        clips = Clips(settings.world)
        encoder = latent_encoder(settings, opened, clips)
        pixels = opened.pipeline.geometry.temporal * (self.known - 1) + 1
        parts: list[dict[str, Tensor]] = []
        for start in range(0, settings.clips, BATCH):
            drawn = [clips.sample(i) for i in range(start, min(start + BATCH, settings.clips))]
            videos, actions = to_video([c.frames for c in drawn]), [c.actions for c in drawn if c.actions is not None]
            told = first_view(opened.pipeline, videos[:, :, 0], pixels)
            made = {"latents": encoder.latents(videos), **told}
            parts.append(
                {k: v.to("cpu", torch.float16) for k, v in made.items()}
                | {"keyboard": torch.from_numpy(np.stack([a.keyboard for a in actions]))}
                | {"mouse": torch.from_numpy(np.stack([a.mouse for a in actions]))}
            )
            if context.on_count:
                context.on_count(start + len(drawn), settings.clips)
        return {name: torch.cat([p[name] for p in parts]).numpy() for name in parts[0]}


def lengthened(condition: Tensor, frames: int) -> Tensor:
    """[B, C', n, h, w] -> [B, C', frames, h, w], the last frame repeated."""
    missing = frames - condition.shape[2]
    return torch.cat([condition, condition[:, :, -1:].expand(-1, -1, missing, -1, -1)], 2) if missing > 0 else condition


def _digest(module: nn.Module) -> str:
    """SHA-256 of a module's weights."""
    found = hashlib.sha256()
    for value in module.state_dict().values():
        found.update(value.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _save(path: Path, arrays: Arrays) -> None:
    """Write arrays as a .npz file, whole or not at all."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
