"""Training a small Wan video autoencoder on clips of a world."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from kinetoscope.core.errors import ConfigError
from kinetoscope.diffusion.noise import randn
from kinetoscope.train.loop import step_generator
from kinetoscope.train.recipe import ClipMix, DecoderSection, VaeSection, WorldSection
from kinetoscope.worlds import get_world

START_LOG_VARIANCE = -5.0
"""Latent noise starts small, or it drowns the signal before there is one."""


def build_vae(section: VaeSection, seed: int) -> Any:
    """A new autoencoder, initialised so that the signal passes through all layers from the first step.

    torch's default shrinks it by a third at every convolution while biases stay, and the decoder then learns to
    ignore the latents. Here each convolution keeps variance, sees only the current frame (the other taps start at
    zero, as when an image model is inflated), and has no bias. Halving time starts by taking the last frame, doubling
    it by showing a frame twice: what was learned on single frames is where clips begin.
    """
    vae: Any = AutoencoderKLWan(**section.config)
    generator = step_generator(seed, 0)
    for name, layer in vae.named_modules():
        if not isinstance(layer, (nn.Conv2d, nn.Conv3d)):
            continue
        weight = layer.weight.data
        now = weight[:, :, -1] if isinstance(layer, nn.Conv3d) else weight
        weight_now = randn(now.shape, generator) * (now[0].numel() ** -0.5)
        weight.zero_()
        if name.endswith("time_conv"):
            now[..., 0, 0] = torch.eye(now.shape[1]).repeat(now.shape[0] // now.shape[1], 1)
        else:
            now.copy_(weight_now * (0.3 if name.endswith("conv2") else 0.0 if name.endswith("proj") else 1.0))
        assert layer.bias is not None
        layer.bias.data.zero_()
    width = vae.config.z_dim
    vae.quant_conv.weight.data[width:] *= 0.1
    vae.quant_conv.bias.data[width:] = START_LOG_VARIANCE
    return vae


def decode_unclamped(vae: Any, z: Tensor) -> Tensor:
    """As `vae.decode(z).sample` [B, 3, T, H, W] without the final clamp, through which no gradient passes."""
    vae.clear_cache()
    x = vae.post_quant_conv(z)
    frames: list[Tensor] = []
    for i in range(z.shape[2]):
        vae._conv_idx = [0]
        first = {"first_chunk": True} if i == 0 else {}
        frames.append(vae.decoder(x[:, :, i : i + 1], feat_cache=vae._feat_map, feat_idx=vae._conv_idx, **first))
    vae.clear_cache()
    out = torch.cat(frames, 2)  # [B, 3 p p, T, H / p, W / p]
    p = vae.config.patch_size
    if p is None:
        return out
    b, _, t, h, w = out.shape
    out = out.view(b, 3, p, p, t, h, w).permute(0, 1, 4, 5, 3, 6, 2)  # channels hold (colour, x, y) of the patch
    return out.reshape(b, 3, t, h * p, w * p)


def to_video(clips: Sequence[np.ndarray[Any, Any]]) -> Tensor:
    """uint8 [T, H, W, 3] arrays -> [B, 3, T, H, W] float32 in [-1, 1]."""
    return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


class VaeTask:
    """Reconstruct clips; a little KL keeps the latents near a unit normal."""

    name = "vae"

    def __init__(self, section: VaeSection, world: WorldSection, seed: int) -> None:
        self.section, self.world_section = section, world
        self.world = get_world(world.name)
        self.module: Any = build_vae(section, seed)

    def losses(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """l1, l2, kl and their weighted total on one batch of one kind."""
        video = self.batch(step, generator)
        with torch.autocast("cpu", torch.bfloat16):
            latent = self.module.encode(video).latent_dist
            noise = randn(latent.mean.shape, generator)
            out = decode_unclamped(self.module, latent.mean + torch.exp(0.5 * latent.logvar) * noise)
        error = out.float() - video
        mean, logvar = latent.mean.float(), latent.logvar.float()
        l1, l2 = error.abs().mean(), error.square().mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        total = self.section.l1 * l1 + self.section.l2 * l2 + self.section.kl * kl
        return {"total": total, "l1": l1, "l2": l2, "kl": kl}

    def batch(self, step: int, generator: torch.Generator) -> Tensor:
        """[B, 3, t, H, W]: windows of clips at a random time, of a random kind."""
        kind = pick_kind(self.section.batches, step / self.section.optimizer.steps, generator)
        return self.clips(kind, generator)

    def clips(self, kind: ClipMix, generator: torch.Generator) -> Tensor:
        """[B, 3, t, H, W]: one batch of a kind."""
        seeds = torch.randint(0, 2**31, (kind.batch,), generator=generator).tolist()
        room = self.world_section.num_frames - kind.frames
        if room < 0:
            raise ConfigError(f"batches of {kind.frames} frames from clips of {self.world_section.num_frames}")
        starts = torch.randint(0, room + 1, (kind.batch,), generator=generator).tolist()
        clips = [self._clip(s) for s in seeds]
        return to_video([c[a : a + kind.frames] for c, a in zip(clips, starts, strict=True)])

    def _clip(self, seed: int) -> np.ndarray[Any, Any]:
        w = self.world_section
        return self.world.sample(seed, height=w.height, width=w.width, num_frames=w.num_frames).frames

    @torch.no_grad()
    def calibrate(self, seed: int) -> None:
        """Measure mean and deviation of the latents over clips from `seed` on; put them into the VAE's config."""
        clips = [self._clip(seed + i) for i in range(self.section.calibration_clips)]
        latents = torch.cat([encode(self.module, to_video([c])) for c in clips])
        mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
        self.module.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())

    @torch.no_grad()
    def psnr(self, seed: int) -> dict[str, float]:
        """Peak signal-to-noise ratio (dB) of reconstructions of whole clips from `seed` on."""
        videos = [to_video([self._clip(seed + i)]) for i in range(min(16, self.section.calibration_clips))]
        errors = [(self.module.decode(encode(self.module, v)).sample - v).square().mean() / 4 for v in videos]
        return {"psnr_db": float(-10 * torch.log10(torch.stack(errors).mean()))}


@torch.no_grad()
def encode(vae: Any, video: Tensor) -> Tensor:
    """Mean latents [B, C, T, H, W] float32 of videos, not normalised."""
    with torch.autocast("cpu", torch.bfloat16):
        return vae.encode(video).latent_dist.mean.float()


class DecoderTask:
    """Reconstruct clips from the fixed latents of a calibrated autoencoder, training its decoder alone."""

    name = "decoder"

    def __init__(self, section: DecoderSection, vae: VaeTask) -> None:
        self.section, self.source = section, vae
        self.vae: Any = vae.module
        self.module = nn.ModuleDict({"decoder": self.vae.decoder, "post_quant_conv": self.vae.post_quant_conv})
        self.std = torch.tensor(self.vae.config.latents_std).view(1, -1, 1, 1, 1)

    def losses(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """l1, l2 and their weighted total on one batch of one kind."""
        kind = pick_kind(self.section.batches, step / self.section.optimizer.steps, generator)
        video = self.source.clips(kind, generator)
        latents = encode(self.vae, video)
        latents = latents + self.section.noise * self.std * randn(latents.shape, generator)
        with torch.autocast("cpu", torch.bfloat16):
            out = decode_unclamped(self.vae, latents)
        error = out.float() - video
        l1, l2 = error.abs().mean(), error.square().mean()
        return {"total": self.section.l1 * l1 + self.section.l2 * l2, "l1": l1, "l2": l2}


def pick_kind(kinds: Sequence[ClipMix], done: float, generator: torch.Generator) -> ClipMix:
    """A kind of batch, by weight, among those that have started when the share `done` of the training is over."""
    started = [k for k in kinds if done >= k.start]
    weights = torch.tensor([k.weight for k in started])
    return started[int(torch.multinomial(weights, 1, generator=generator))]
