"""Training a transformer by flow matching, on latents and text states of frozen encoders."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import UMT5Config

from kinetoscope.core.errors import ConfigError, OutputError
from kinetoscope.core.file_lock import file_lock
from kinetoscope.core.files import publish, write_text
from kinetoscope.core.types import SamplingParams
from kinetoscope.diffusion.convention import shift_sigma
from kinetoscope.diffusion.denoiser import Denoiser
from kinetoscope.diffusion.noise import randn
from kinetoscope.models.wan.spec import CONVENTION, TEXT_LENGTH, WanConfig
from kinetoscope.models.wan.transformer import WanTransformer3DModel
from kinetoscope.pipelines.stages.validation import VideoGeometry
from kinetoscope.train.loop import step_generator
from kinetoscope.train.recipe import TransformerSection, VideoRecipe, WorldSection
from kinetoscope.train.text import encode_text
from kinetoscope.train.vae import Clips, pick_kind
from kinetoscope.worlds import get_world

BATCH = 32


class LatentEncoder(Protocol):
    """What makes latents of clips: a `Basis`, or a model's own VAE."""

    def latents(self, video: Tensor) -> Tensor:
        """Clips [B, 3, T, H, W] in [-1, 1] -> normalised latents [B, C, t, h, w]."""
        ...


def prepare_latents(
    make_encoder: Callable[[], LatentEncoder],
    clips: Clips,
    count: int,
    path: Path,
    on_clip: Callable[[int, int], None] | None = None,
) -> np.ndarray[Any, Any]:
    """Return the normalised latents of the world's first `count` clips, float16 [N, C, T, H, W], kept in a .npy file.

    One process makes the file, and others wait for it. An interrupted preparation continues where it was.

    Args:
        make_encoder: returns the encoder; called if the file is not there.
        path: of the file.
        on_clip: called with (clips done, `count`).

    Raises:
        ConfigError: the file is damaged.
        OutputError: the file cannot be written.
    """
    if not path.exists():
        with file_lock(path):
            if not path.exists():
                encoder = make_encoder()
                try:
                    _encode_clips(encoder, clips, count, path, on_clip)
                except OSError as error:
                    raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise ConfigError(f"latents {path} cannot be read ({error}); delete the file, and it is made again") from error


def _encode_clips(
    encoder: LatentEncoder, clips: Clips, count: int, path: Path, on_clip: Callable[[int, int], None] | None
) -> None:
    """Write the latents of `prepare_latents`; the file gets its name when all of them are there.

    The unfinished file has a fixed name, under which the next start continues it; `prepare_latents` holds its lock.
    """
    part, progress = path.with_suffix(".part.npy"), path.with_suffix(".count")
    done = _clips_done(part, progress, count)
    latents: Any = np.load(part, mmap_mode="r+") if done else None
    for start in range(done, count, BATCH):
        seeds = range(start, min(start + BATCH, count))
        z = encoder.latents(torch.cat([clips.whole(s) for s in seeds]))
        if latents is None:
            latents = _new_array(part, (count, *z.shape[1:]))
        latents[seeds.start : seeds.stop] = z.to(torch.float16).numpy()
        latents.flush()
        write_text(progress, str(seeds.stop))
        if on_clip:
            on_clip(seeds.stop, count)
    publish(part, path)
    progress.unlink()


def _new_array(path: Path, shape: tuple[int, ...]) -> Any:
    """Return a new float16 array of this shape in a file whose blocks are reserved on the disk.

    Where the disk is full when a mapped page is written, a signal ends the process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.lib.format.open_memmap(path, "w+", np.float16, shape)
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _clips_done(part: Path, progress: Path, count: int) -> int:
    """Return how many clips an interrupted preparation has finished; 0 where its files do not say."""
    try:
        done = int(progress.read_text(encoding="utf-8"))
        return done if 0 < done <= count and len(np.load(part, mmap_mode="r")) == count else 0
    except (OSError, ValueError):
        return 0


def check_transformer(recipe: VideoRecipe) -> None:
    """Check that the transformer of a recipe can be made, and fits its autoencoder, text encoder and clips.

    Raises:
        ConfigError: it does not; the message names the settings.
        InputError: the size of the clips does not divide into the transformer's tokens.
    """
    config, vae, world = WanConfig.from_dict(recipe.transformer.config), recipe.vae.config, recipe.world
    text = recipe.text.config
    with torch.device("meta"):
        WanTransformer3DModel(config)
    for name, size, other, wanted in (
        ("in_channels", config.in_channels, "vae.config.z_dim", vae["z_dim"]),
        ("out_channels", config.out_channels, "vae.config.z_dim", vae["z_dim"]),
        ("text_dim", config.text_dim, "text.config.d_model", text.get("d_model", UMT5Config().d_model)),
    ):
        if size != wanted:
            raise ConfigError(f"transformer.config.{name}={size}: it must be {other}, which is {wanted}")
    size = SamplingParams(height=world.height, width=world.width, num_frames=world.num_frames)
    VideoGeometry.of(vae, config.patch_size).check(size)


class FlowTask:
    """Flow matching: the transformer predicts noise minus clip at a random noise level (arXiv 2209.03003)."""

    name = "transformer"

    def __init__(
        self,
        section: TransformerSection,
        world: WorldSection,
        latents: np.ndarray[Any, Any],
        scale: Tensor,
        tokenizer: Any,
        text_encoder: nn.Module,
        seed: int,
    ) -> None:
        self.section = section
        self.latents, self.scale = latents, scale  # of a latent channel in pixels [C]
        self.temporal = (world.num_frames - 1) // max(latents.shape[2] - 1, 1)  # frames a latent frame
        self.tokenizer, self.text_encoder = tokenizer, text_encoder
        source = get_world(world.name)
        self.specs = [source.sample(i, height=16, width=16, num_frames=1).spec for i in range(len(latents))]
        self.module = WanTransformer3DModel(WanConfig.from_dict(section.config))
        self.module.init_weights(step_generator(seed, 0))
        self.denoiser = Denoiser(self.module, CONVENTION)

    def losses(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Mean squared velocity error over a batch."""
        kind = pick_kind(self.section.batches, step, generator)
        picked = torch.randint(0, len(self.latents), (kind.batch,), generator=generator)
        chosen = self.latents[picked.numpy(), :, : 1 + (kind.frames - 1) // self.temporal]
        x0 = torch.from_numpy(np.asarray(chosen, dtype=np.float32))
        states, lengths = self.encode(self.sentences(picked, generator))
        noise = randn(x0.shape, generator)
        levels = [stage for stage in self.section.levels if step >= stage.start][-1]
        u = torch.sigmoid(levels.logit_mean + levels.logit_std * randn((len(x0),), generator))
        weight = self.scale**levels.emphasis  # [C]
        loss = self.denoiser.loss(
            x0, noise, shift_sigma(u, levels.shift), weight=(weight / weight.mean()).view(-1, 1, 1, 1),
            encoder_hidden_states=states, text_lengths=lengths,
        )  # fmt: skip
        return {"total": loss.mean()}

    def sentences(self, picked: Tensor, generator: torch.Generator) -> list[str]:
        """A fresh wording for each clip; some are dropped to the empty prompt, for guidance."""
        rng = np.random.default_rng(int(torch.randint(0, 2**31, (1,), generator=generator)))
        captions = [self.specs[i].caption(rng) for i in picked.tolist()]
        return ["" if rng.random() < self.section.caption_dropout else c for c in captions]

    def encode(self, sentences: list[str]) -> tuple[Tensor, Tensor]:
        """Token states padded with zeros to the trained length [B, 512, d], and true lengths [B]."""
        states, lengths = encode_text(self.tokenizer, self.text_encoder, sentences)
        return nn.functional.pad(states, (0, 0, 0, TEXT_LENGTH - states.shape[1])), lengths
