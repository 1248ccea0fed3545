"""Latents to frames."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kinetoscope.core.types import ExecutionArgs, ForwardBatch
from kinetoscope.pipelines.lazy import Lazy, resolve
from kinetoscope.pipelines.stages.base import Stage


class DecodingStage(Stage):
    """Fills `frames` by the VAE.

    Args:
        vae: a diffusers video VAE whose config may hold `latents_mean` and `latents_std`, or lazy.
    """

    def __init__(self, vae: Any | Lazy[Any]) -> None:
        self._vae = vae

    @torch.no_grad()
    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The batch with one uint8 [T, H, W, 3] array a sample, decoded one at a time to bound memory."""
        assert batch.latents is not None
        batch.frames = [self.decode(sample) for sample in batch.latents]
        return batch

    def decode(self, latents: Tensor) -> Any:
        """uint8 array [T, H, W, 3] from normalised latents [C, t, h, w]."""
        vae = resolve(self._vae)
        z = latents.unsqueeze(0).to(next(vae.parameters()).dtype)
        video = vae.decode(denormalize(z, vae.config), return_dict=False)[0][0]  # [3, T, H, W] in [-1, 1]
        video = video.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
        return video.permute(1, 2, 3, 0).contiguous().cpu().numpy()


def denormalize(latents: Tensor, config: Any) -> Tensor:
    """The VAE's own latents from the transformer's normalised ones [B, C, T, H, W]: z std + mean per channel."""
    shape = (1, -1, 1, 1, 1)
    mean = torch.tensor(config.latents_mean, device=latents.device, dtype=latents.dtype).view(shape)
    std = torch.tensor(config.latents_std, device=latents.device, dtype=latents.dtype).view(shape)
    return latents * std + mean
