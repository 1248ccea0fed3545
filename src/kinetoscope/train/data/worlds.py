"""Batches of a procedural world: clips drawn by a program, as latents, under captions worded anew each time."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from kinetoscope.core.errors import ConfigError
from kinetoscope.train.basis import fit_basis
from kinetoscope.train.data import DataSection, SourceContext
from kinetoscope.train.flow import LatentEncoder, prepare_latents
from kinetoscope.train.plugins import Opened
from kinetoscope.train.recipe import Positive, WorldSection
from kinetoscope.train.roles import TrainBatch
from kinetoscope.train.run_inputs import sampled_digest, text_digest
from kinetoscope.train.vae import Clips

MEASURED_SEED = 10**9
"""Clips from here on measure the basis, as in the recipe of tiny-t2v."""


class WorldData(DataSection):
    """Settings of `WorldSource`.

    Attributes:
        world: which, and the size of its clips.
        batch: samples of a micro-batch.
        frames: pixel frames from the beginning of a clip; None: all.
        clips: how many there are; each epoch words their captions anew.
        latents: "encoder": by the model's own VAE. "basis": principal components of blocks of pixels, which the VAEs
            of the tiny models were trained to compute; the same thing without the encoder's error, and far faster.
            "none": zeros, for methods that need prompts alone.
        basis_clips: clips over which the components are measured.
        basis_frames: pixel frames of these clips, as in the recipe of the VAE; None: as many as `world` says.
        whitening: of the components (`train.basis.Basis`), as there.
        cache: folder in which latents are kept for all runs with the same clips.
    """

    world: WorldSection
    batch: Positive = 8
    frames: Positive | None = None
    clips: Positive = 8192
    latents: Literal["encoder", "basis", "none"] = "encoder"
    basis_clips: Positive = Field(512)
    basis_frames: Positive | None = None
    whitening: float = Field(default=1.0, ge=0, le=1)
    cache: str = "runs/latents"

    @property
    def prompts_only(self) -> bool:
        """Return whether latents are zeros."""
        return self.latents == "none"

    @model_validator(mode="after")
    def _basis(self) -> WorldData:
        for name in ("basis_clips", "basis_frames", "whitening"):
            value = getattr(self, name)
            if self.latents != "basis" and value != type(self).model_fields[name].default:
                raise ValueError(f"{name}={value} has no effect without latents=basis; leave it out")
        return self


class WorldSource:
    """Clips of a world (`WorldData`)."""

    settings_class: ClassVar[type[WorldData]] = WorldData

    def __init__(self, settings: WorldData, context: SourceContext) -> None:
        world, opened = settings.world, context.opened
        self.settings, self.encode = settings, opened.encoder()
        clips = Clips(world)
        size = latent_size(settings, opened)
        self.frames = size[0]
        self.specs = [
            clips.world.sample(i, height=16, width=16, num_frames=1).spec for i in range(settings.clips)
        ]  # drawn small: a spec does not depend on the size
        self.latents: Any = None
        if settings.latents == "none":
            self.shape = (opened.latent_channels(), *size)
            return
        path = kept_under(settings, opened).with_suffix(".npy")
        make = partial(latent_encoder, settings, opened, clips)
        self.latents = prepare_latents(make, clips, settings.clips, path, context.on_count)
        self._path = path

    def inputs(self) -> dict[str, str]:
        """Return digests of the captions, and of the file of latents."""
        captions = [spec.caption(np.random.default_rng(i)) for i, spec in enumerate(self.specs)]
        found = {"data captions": text_digest(*captions)}
        return found if self.latents is None else {**found, "data latents": sampled_digest(self._path)}

    def batch(self, step: int, generator: torch.Generator) -> TrainBatch:
        """Random clips under fresh captions."""
        picked = torch.randint(0, self.settings.clips, (self.settings.batch,), generator=generator)
        rng = np.random.default_rng(int(torch.randint(0, 2**31, (1,), generator=generator)))
        captions = tuple(self.specs[i].caption(rng) for i in picked.tolist())
        text = self.encode(list(captions))
        if self.latents is None:
            return TrainBatch(torch.zeros(len(picked), *self.shape), text, captions)
        chosen = self.latents[picked.numpy(), :, : self.frames]
        return TrainBatch(torch.from_numpy(np.asarray(chosen, dtype=np.float32)), text, captions)


def latent_size(settings: WorldData, opened: Opened) -> tuple[int, int, int]:
    """(T, h, w) of what is trained on.

    Raises:
        ConfigError: `settings.frames` is no number of pixel frames of such a clip.
    """
    world, geometry = settings.world, opened.pipeline.geometry
    frames = settings.frames or world.num_frames
    if frames > world.num_frames or (frames - 1) % geometry.temporal:
        raise ConfigError(
            f"data.frames={frames}: use 1 + a multiple of {geometry.temporal}, and at most the clip's "
            f"{world.num_frames}"
        )
    return geometry.latent_size(frames, world.height, world.width)


def latent_encoder(settings: WorldData, opened: Opened, clips: Clips) -> LatentEncoder:
    """What makes the latents of clips."""
    if settings.latents == "encoder":
        return OwnEncoder(opened)
    vae = opened.model.config("vae")
    if settings.basis_frames:
        clips = Clips(settings.world.model_copy(update={"num_frames": settings.basis_frames}))
    return fit_basis(
        clips.whole, settings.basis_clips, int(vae["z_dim"]), int(vae["scale_factor_spatial"]),
        int(vae["scale_factor_temporal"]), MEASURED_SEED, settings.whitening,
    )  # fmt: skip


def kept_under(settings: WorldData, opened: Opened, **more: Any) -> Path:
    """Path in the cache, without a suffix; it names what the latents depend on, and `more`."""
    drawn = hashlib.sha256(Clips(settings.world).sample(0).frames.tobytes()).hexdigest()  # a world may change its looks
    facts: dict[str, Any] = {"world": settings.world.model_dump(), "drawn": drawn}
    facts |= {"clips": settings.clips, "latents": settings.latents}
    if settings.latents == "basis":
        facts |= {"basis_clips": settings.basis_clips, "vae": opened.model.config("vae")}
        facts |= settings.model_dump(include={"basis_frames", "whitening"}, exclude_defaults=True)
    else:
        files = sorted(opened.model.folder("vae").glob("*.safetensors"))
        facts["vae"] = [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]
    digest = hashlib.sha256(json.dumps(facts | more, sort_keys=True).encode()).hexdigest()[:16]
    return Path(settings.cache) / f"{settings.world.name}-{digest}"


class OwnEncoder:
    """Latents by the VAE of an opened model, as sampling takes them."""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened

    def latents(self, video: Tensor) -> Tensor:
        """Clips [B, 3, T, H, W] in [-1, 1] -> normalised latents [B, C, t, h, w] float32."""
        return self._opened.encode_video(video).cpu()
