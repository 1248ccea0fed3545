"""Latents to frames."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kinetoscope.core.errors import CompositionError
from kinetoscope.core.transfer import device_constant
from kinetoscope.core.types import ExecutionArgs, ForwardBatch
from kinetoscope.pipelines.lazy import Lazy, resolve
from kinetoscope.pipelines.stages.base import Stage
from kinetoscope.pipelines.stages.denoising import not_finite

VAE_MODES: dict[str, str] = {
    "whole": "all latent frames in one call",
    "streaming": "one latent frame at a time; the same frames",
    "tiled": "in overlapping tiles whose borders are blended; other frames",
}


class DecodingStage(Stage):
    """Fills `frames` by the VAE.

    Args:
        vae: a diffusers video VAE whose config may hold `latents_mean` and `latents_std`, or lazy.

    Attributes:
        streaming: decode one latent frame at a time. The frames are the same; the float video is never whole.
    """

    def __init__(self, vae: Any | Lazy[Any]) -> None:
        self._vae = vae
        self.streaming = False

    def stream(self) -> FrameStream:
        """A decoder for one stream.

        Raises:
            CompositionError: see `FrameStream`.
        """
        return FrameStream(self._vae)

    @torch.no_grad()
    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The batch with one uint8 [T, H, W, 3] array a sample, decoded one at a time to bound memory."""
        assert batch.latents is not None
        batch.frames = [self.decode(sample) for sample in batch.latents]
        return batch

    def decode(self, latents: Tensor) -> Any:
        """uint8 array [T, H, W, 3] from normalised latents [C, t, h, w]."""
        if self.streaming:
            stream = self.stream()
            return np.concatenate([stream.decode(frame) for frame in latents.split(1, dim=1)])
        vae = resolve(self._vae)
        z = latents.unsqueeze(0).to(next(vae.parameters()).dtype)
        video = vae.decode(denormalize(z, vae.config), return_dict=False)[0][0]  # [3, T, H, W] in [-1, 1]
        return to_frames(video)


class FrameStream:
    """Latents to frames a few at a time: the frames of decoding them all at once.

    The decoder is causal in time. What its convolutions need of earlier frames (two each) is kept here, not in the VAE,
    so streams that share a VAE do not meet.

    Args:
        vae: diffusers' `AutoencoderKLWan`, with or without patches, or lazy.

    Raises:
        CompositionError: another VAE; it may look ahead.
    """

    def __init__(self, vae: Any | Lazy[Any]) -> None:
        from diffusers import AutoencoderKLWan  # pyright: ignore[reportPrivateImportUsage]

        if not isinstance(found := resolve(vae), AutoencoderKLWan):
            raise CompositionError(f"streams are decoded by AutoencoderKLWan; this model has {type(found).__name__}")
        self._vae = vae
        self._past: list[Any] | None = None

    @torch.no_grad()
    def decode(self, latents: Tensor, *, check: bool = False) -> Any:
        """Return frames uint8 [T, H, W, 3] of the next normalised latents [C, t, h, w].

        T is 1 + 4 (t - 1) the first time, and 4 t later.

        Args:
            latents: see above.
            check: refuse latents that are not finite; the host reads the frames and the answer at once.

        Raises:
            KinetoscopeError: `check` found values that are not finite.
        """
        vae: Any = resolve(self._vae)
        z = latents.unsqueeze(0).to(next(vae.parameters()).dtype)
        z = vae.post_quant_conv(denormalize(z, vae.config))
        parts: list[Tensor] = []
        for frame in z.split(1, dim=2):
            first = {"first_chunk": True} if self._past is None else {}
            if self._past is None:
                self._past = [None] * vae._cached_conv_counts["decoder"]
            parts.append(vae.decoder(frame, feat_cache=self._past, feat_idx=[0], **first))
        video = torch.cat(parts, dim=2)  # [1, 3 p p, T, H / p, W / p]
        return to_frames(_join_patches(video, vae.config.patch_size or 1)[0], latents if check else None)


def _join_patches(x: Tensor, p: int) -> Tensor:
    """[B, 3 p p, T, H, W] whose channels are (colour, x, y) of a patch -> [B, 3, T, H p, W p]."""
    return x.unflatten(1, (3, p, p)).permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)


def to_frames(video: Tensor, latents: Tensor | None = None) -> Any:
    """Return the uint8 array [T, H, W, 3] of a video [3, T, H, W] in [-1, 1].

    Args:
        video: see above.
        latents: what the video was decoded from; whether they are finite is read together with the frames.

    Raises:
        KinetoscopeError: the latents are not finite.
    """
    pixels = video.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(1, 2, 3, 0)
    if latents is None:
        return pixels.contiguous().cpu().numpy()
    finite = torch.isfinite(latents).all().to(torch.uint8).view(1)
    read = torch.cat([pixels.flatten(), finite]).cpu().numpy()
    if not read[-1]:
        raise not_finite()
    return read[:-1].reshape(pixels.shape)


def denormalize(latents: Tensor, config: Any) -> Tensor:
    """The VAE's own latents from the transformer's normalised ones [B, C, T, H, W]: z std + mean per channel."""
    mean, std = channel_statistics(config, latents)
    return latents * std + mean


def channel_statistics(config: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of a VAE's latents, [1, C, 1, 1, 1] each, on the device of `like` in its dtype."""
    values = (device_constant(v, like.device, like.dtype) for v in (config["latents_mean"], config["latents_std"]))
    mean, std = (v.view(1, -1, 1, 1, 1) for v in values)
    return mean, std
