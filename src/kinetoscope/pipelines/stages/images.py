"""Images and videos of a request, as the transformer takes them: features, condition latents, a noised start."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kinetoscope.core.errors import InputError
from kinetoscope.core.types import ExecutionArgs, ForwardBatch
from kinetoscope.diffusion.scheduler import SchedulerAdapter, check_flow
from kinetoscope.engine.strategies.standard import first_step
from kinetoscope.pipelines.lazy import Lazy, resolve
from kinetoscope.pipelines.stages.base import Stage
from kinetoscope.pipelines.stages.decoding import channel_statistics
from kinetoscope.pipelines.stages.validation import VideoGeometry


def encode_video(vae: Any, video: Tensor) -> Tensor:
    """Normalised latents [B, C, t, h, w] float32 of a video [B, 3, T, H, W] in [-1, 1]: the posterior's mode."""
    parameter = next(vae.parameters())
    modes = [vae.encode(v.unsqueeze(0).to(parameter)).latent_dist.mode() for v in video]
    return normalize(torch.cat(modes).float(), vae.config)


def normalize(z: Tensor, config: Any) -> Tensor:
    """The transformer's latents from the VAE's own [B, C, T, H, W] float32: (z - mean) / std per channel."""
    mean, std = channel_statistics(config, z)
    return (z - mean) / std


def split_patches(x: Tensor, p: int) -> Tensor:
    """[B, 3, T, H, W] -> [B, 3 p p, T, H / p, W / p] with channels (colour, x, y) of a patch, for Wan 2.2's VAE."""
    return x.unflatten(4, (-1, p)).unflatten(3, (-1, p)).permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


class ImageFeatureStage(Stage):
    """Fills `image_embeds` with CLIP features of the first image, and of the last if there is one.

    Args:
        processor: of `transformers`, or lazy.
        encoder: a CLIP vision model, or lazy; the second last hidden state is used (Wan 2.1, arXiv 2503.20314).
    """

    def __init__(self, processor: Any | Lazy[Any], encoder: Any | Lazy[Any]) -> None:
        self._processor, self._encoder = processor, encoder

    @torch.no_grad()
    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The batch with `image_embeds` [B, N, D], or [B, 2 N, D] with a last image."""
        assert batch.image is not None
        parts = [self.encode(i, args) for i in (batch.image, batch.last_image) if i is not None]
        batch.image_embeds = torch.cat(parts, 1)
        return batch

    def encode(self, images: Tensor, args: ExecutionArgs) -> Tensor:
        """[B, N, D] features of images [B, 3, H, W] in [-1, 1]."""
        pixels = images.add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        inputs = resolve(self._processor)(images=list(pixels), return_tensors="pt").pixel_values
        encoder = resolve(self._encoder)
        parameter = next(encoder.parameters())
        return encoder(inputs.to(parameter), output_hidden_states=True).hidden_states[-2]


class ImageConditionStage(Stage):
    """Fills `condition` with a mask of the given frames and the latents of a video that holds only them.

    Channels: the mask, one for each frame of a latent frame, then the latents (Wan image-to-video).

    Args:
        vae: a diffusers video VAE, or lazy.
        geometry: pixels to latents.
    """

    def __init__(self, vae: Any | Lazy[Any], geometry: VideoGeometry) -> None:
        self._vae = vae
        self.geometry = geometry

    @torch.no_grad()
    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The batch with `condition` [B, mask + C, t, h, w]."""
        params = batch.params
        assert batch.image is not None and params.num_frames and params.height and params.width
        given = torch.zeros(params.num_frames)
        given[0] = 1
        video = batch.image.new_zeros(batch.size, 3, params.num_frames, params.height, params.width)
        video[:, :, 0] = batch.image
        if batch.last_image is not None:
            if params.num_frames == 1:
                raise InputError("a first and a last image need at least two frames; raise num_frames")
            given[-1] = 1
            video[:, :, -1] = batch.last_image
        latents = encode_video(resolve(self._vae), video.to(args.device))
        step = self.geometry.temporal
        mask = torch.cat([given[:1].repeat(step), given[1:]]).view(-1, step)  # [t, step]
        mask = mask.T.view(1, step, -1, 1, 1).expand(batch.size, -1, -1, *latents.shape[-2:])
        batch.condition = torch.cat([mask.to(latents), latents], 1)
        return batch


class FirstFrameStage(Stage):
    """Fills `condition` with the latents of the image, which stay as the first latent frame (Wan 2.2 TI2V)."""

    def __init__(self, vae: Any | Lazy[Any]) -> None:
        self._vae = vae

    @torch.no_grad()
    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The batch with `condition` [B, C, 1, h, w]; nothing changes without an image."""
        if batch.image is not None:
            batch.condition = encode_video(resolve(self._vae), batch.image.unsqueeze(2).to(args.device))
        return batch


class NoisedVideoStage(Stage):
    """Turns a given video into the start of the run: its latents, noised to the level of the first step.

    Args:
        vae: a diffusers video VAE, or lazy.
        scheduler: the prototype, or lazy.
    """

    def __init__(self, vae: Any | Lazy[Any], scheduler: SchedulerAdapter | Lazy[SchedulerAdapter]) -> None:
        self._vae, self._scheduler = vae, scheduler

    @torch.no_grad()
    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The batch with `latents` (1 - s) z + s noise; nothing changes without a video.

        Raises:
            InputError: `strength` leaves no step to do.
            ConfigError: the noise levels of the schedule are not those of a flow.
        """
        params = batch.params
        if batch.video is None:
            return batch
        assert batch.latents is not None and params.num_inference_steps
        begin = first_step(params)
        if begin == params.num_inference_steps:
            raise InputError(
                f"strength={params.strength} of {params.num_inference_steps} steps leaves none to do; "
                f"raise strength to {1 / params.num_inference_steps:.2g} or more, or take more steps"
            )
        prototype = resolve(self._scheduler).override(params.scheduler, params.flow_shift)
        level = prototype.start(params.num_inference_steps, begin=begin).sigmas[0]
        check_flow(prototype, level)
        z = encode_video(resolve(self._vae), batch.video.to(args.device))
        batch.latents = (1 - level) * z + level * batch.latents.to(z)
        return batch
