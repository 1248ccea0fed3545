"""Stages of LTX-Video: padded text, a schedule that follows the size, a first frame, a VAE that may be told a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kinetoscope.core.errors import InputError
from kinetoscope.core.transfer import device_constant, to_device
from kinetoscope.core.types import ExecutionArgs, ForwardBatch
from kinetoscope.diffusion.noise import NoiseSource, SeededDraws
from kinetoscope.diffusion.scheduler import SchedulerAdapter
from kinetoscope.models.ltx.strategy import start_schedule
from kinetoscope.pipelines.lazy import Lazy, resolve
from kinetoscope.pipelines.stages.base import Stage
from kinetoscope.pipelines.stages.decoding import DecodingStage, to_frames
from kinetoscope.pipelines.stages.latents import LatentPreparationStage
from kinetoscope.pipelines.stages.text import TextEncodingStage
from kinetoscope.pipelines.stages.validation import InputValidationStage, VideoGeometry


class TimedValidationStage(InputValidationStage):
    """Checks the whole request, `decode_timestep` and `decode_noise_scale` too."""

    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The same batch, or an `InputError`."""
        for name, value in (batch.params.extra or {}).items():
            if value is not None and (type(value) not in (int, float) or not 0 <= value <= 1):
                raise InputError(f"{name}={value!r} should be a number in [0, 1]")
        return super().forward(batch, args)


class PaddedTextEncodingStage(TextEncodingStage):
    """Text encoded with its padding in sight: the encoder gets no mask, so the padding colours the true tokens.

    The lengths tell the transformer which tokens to read.
    """

    def encode(self, prompts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Embeddings [B, max_length, D] and true lengths [B] (int64, CPU).

        Raises:
            InputError: a prompt is longer than `max_length` tokens.
        """
        lengths = [len(resolve(self._tokenizer)(prompt).input_ids) for prompt in prompts]
        if max(lengths) > self.max_length:
            raise InputError(
                f"the prompt has {max(lengths)} tokens and the model reads at most {self.max_length}; shorten it"
            )
        embeds = [self._cache.get(p, lambda p=p: self._encode_one(p, device)) for p in prompts]
        return torch.stack(embeds), torch.tensor(lengths)

    def _encode_one(self, prompt: str, device: torch.device) -> Tensor:
        padded = resolve(self._tokenizer)(prompt, padding="max_length", max_length=self.max_length, return_tensors="pt")
        with torch.no_grad():
            return resolve(self._text_encoder)(padded.input_ids.to(device)).last_hidden_state[0]


class SizedTimestepStage(Stage):
    """Fills `timesteps` with the schedule of a video of this size.

    Args:
        scheduler: the prototype, or lazy.
        geometry: pixels to latents.
    """

    def __init__(self, scheduler: SchedulerAdapter | Lazy[SchedulerAdapter], geometry: VideoGeometry) -> None:
        self._scheduler = scheduler
        self.geometry = geometry

    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The batch with `timesteps` [S] on the CPU."""
        params = batch.params
        assert params.num_frames and params.height and params.width
        size = self.geometry.latent_size(params.num_frames, params.height, params.width)
        batch.timesteps = start_schedule(resolve(self._scheduler), params, size).timesteps
        return batch


class FirstFrameLatentStage(LatentPreparationStage):
    """Noise; where the batch has an image, its latent is the first frame and `condition`.

    Args:
        geometry: pixels to latents.
        channels: latent channels C.
        vae: encodes the image, or lazy.
    """

    def __init__(self, geometry: VideoGeometry, channels: int, vae: Any | Lazy[Any]) -> None:
        super().__init__(geometry, channels)
        self._vae = vae

    @torch.no_grad()
    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The batch with `latents` [B, C, T, H, W] and, given an image, `condition` [B, C, 1, H, W]."""
        if batch.image is None:
            return super().forward(batch, args)
        source = NoiseSource(batch.seeds)
        first = batch.condition = self.encode(batch.image, source)
        if batch.latents is None:
            params = batch.params
            assert params.num_frames and params.height and params.width
            size = self.geometry.latent_size(params.num_frames, params.height, params.width)
            batch.latents = source.draw((self.channels, *size))
        batch = super().forward(batch, args)  # checks the latents
        assert batch.latents is not None
        batch.noise = source
        batch.latents = torch.cat([first, batch.latents[:, :, 1:]], dim=2)
        return batch

    def encode(self, image: Tensor, source: NoiseSource) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> normalised latents [B, C, 1, h, w] on the CPU, a draw of the VAE's posterior."""
        vae = resolve(self._vae)
        weight = next(vae.parameters())
        posteriors = [vae.encode(i[None, :, None].to(weight)).latent_dist for i in image]
        mean = torch.cat([p.mean for p in posteriors]).float().cpu()  # [B, C, 1, h, w]
        std = torch.cat([p.std for p in posteriors]).float().cpu()
        shape = (1, -1, 1, 1, 1)
        z = mean + std * source.draw(mean.shape[1:])
        return (z - vae.latents_mean.cpu().view(shape)) / vae.latents_std.cpu().view(shape)


class TimedDecodingStage(DecodingStage):
    """Latents to frames by a VAE that may be conditioned on a noise level.

    Reads `decode_timestep` and `decode_noise_scale` of the request.
    """

    @torch.no_grad()
    def forward(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """The batch with one uint8 [T, H, W, 3] array a sample."""
        assert batch.latents is not None and batch.noise is not None
        vae = resolve(self._vae)
        shape = (-1, 1, 1, 1)
        level = None
        latents = batch.latents.float()
        mean, std = vae.latents_mean.to(latents).view(shape), vae.latents_std.to(latents).view(shape)
        latents = latents * std / vae.config.scaling_factor + mean
        if vae.config.timestep_conditioning:
            extra = batch.params.extra or {}
            level = float(extra.get("decode_timestep", 0.0))
            given = extra.get("decode_noise_scale")
            scale = level if given is None else float(given)
            noise = to_device(batch.noise.draw(latents.shape[1:]), latents.device, latents.dtype)
            latents = (1 - scale) * latents + scale * noise
        batch.frames = [
            self.decode_timed(sample, level, seed) for sample, seed in zip(latents, batch.seeds, strict=True)
        ]
        return batch

    def decode_timed(self, z: Tensor, level: float | None, seed: int) -> Any:
        """uint8 array [T, H, W, 3] from the VAE's own latents [C, t, h, w]."""
        vae = resolve(self._vae)
        z = z.unsqueeze(0).to(next(vae.parameters()).dtype)
        time = None if level is None else device_constant([level], z.device, z.dtype)
        with SeededDraws(seed):  # some of these VAEs add noise as they decode
            video = vae.decode(z, time, return_dict=False)[0][0]  # [3, T, H, W] in [-1, 1]
        return to_frames(video)
