"""VAEs whose latents are normalised by one factor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kinetoscope.core.types import ExecutionArgs, ForwardBatch
from kinetoscope.pipelines.lazy import Lazy, resolve
from kinetoscope.pipelines.stages.base import Stage
from kinetoscope.pipelines.stages.decoding import to_frames


class ScaledDecodingStage(Stage):
    """Fills `frames` by a VAE whose `scaling_factor` normalises its latents.

    Args:
        vae: a diffusers video VAE, or lazy.
        skip: latent frames at the start that hold a condition: they are decoded, for what follows depends on them, and
            then left out of `frames` and `latents`.
    """

    def __init__(self, vae: Any | Lazy[Any], skip: int = 0) -> None:
        self._vae = vae
        self.skip = skip

    @torch.no_grad()
    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The batch with one uint8 [T, H, W, 3] array a sample, decoded one at a time to bound memory."""
        assert batch.latents is not None
        batch.frames = [self.decode(sample) for sample in batch.latents]
        batch.latents = batch.latents[:, :, self.skip :]
        return batch

    def decode(self, latents: Tensor) -> Any:
        """uint8 array [T, H, W, 3] from normalised latents [C, t, h, w]."""
        vae = resolve(self._vae)
        z = latents.unsqueeze(0).to(next(vae.parameters()).dtype) / vae.config.scaling_factor
        video = vae.decode(z, return_dict=False)[0][0, :, self.skip * vae.temporal_compression_ratio :]
        return to_frames(video)


@torch.no_grad()
def encode_images(vae: Any, images: Tensor) -> Tensor:
    """Normalised latents [B, C, 1, h, w] float32 on the CPU: the mode of the VAE's posterior.

    Args:
        vae: as for decoding.
        images: [B, 3, H, W] in [-1, 1].
    """
    return encode_scaled(vae, images.unsqueeze(2)).cpu()


@torch.no_grad()
def encode_scaled(vae: Any, video: Tensor) -> Tensor:
    """Normalised latents [B, C, t, h, w] float32 of videos [B, 3, T, H, W] in [-1, 1]: the posterior's mode."""
    weight = next(vae.parameters())
    modes = [vae.encode(v.unsqueeze(0).to(weight)).latent_dist.mode() for v in video]
    return torch.cat(modes).float() * vae.config.scaling_factor
