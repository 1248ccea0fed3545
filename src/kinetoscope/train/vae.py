"""Training the two halves of a small Wan video autoencoder on clips of a world, its latent space given.

Neither half needs the other, and the transformer needs neither: the three can be trained at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from kinetoscope.core.errors import ConfigError
from kinetoscope.diffusion.noise import randn
from kinetoscope.train.basis import Basis
from kinetoscope.train.loop import step_generator
from kinetoscope.train.recipe import ClipMix, DecoderSection, EncoderSection, WorldSection
from kinetoscope.worlds import Clip, get_world

LOG_VARIANCE = -8.0
"""Of the latents, everywhere: they are a function of the clip, as good as without noise."""


def build_vae(config: dict[str, Any], seed: int) -> Any:
    """A new autoencoder, initialised so that the signal passes through all layers from the first step.

    torch's default shrinks it by a third at every convolution while biases stay, and the decoder then learns to
    ignore the latents. Here each convolution keeps variance, sees only the current frame (the other taps start at
    zero, as when an image model is inflated), and has no bias. Halving time starts by taking the last frame, doubling
    it by showing a frame twice: what was learned on single frames is where clips begin.
    """
    vae: Any = AutoencoderKLWan(**config)
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
    vae.quant_conv.weight.data[width:] = 0
    vae.quant_conv.bias.data[width:] = LOG_VARIANCE
    vae.register_to_config(latents_mean=[0.0] * width, latents_std=[1.0] * width)
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


class Clips:
    """Clips of a world as tensors, by seed."""

    def __init__(self, section: WorldSection) -> None:
        self.section, self.world = section, get_world(section.name)

    def sample(self, seed: int) -> Clip[Any]:
        """As the world draws it."""
        w = self.section
        return self.world.sample(seed, height=w.height, width=w.width, num_frames=w.num_frames)

    def whole(self, seed: int) -> Tensor:
        """[1, 3, T, H, W] in [-1, 1]."""
        return to_video([self.sample(seed).frames])

    def batch(self, kinds: Sequence[ClipMix], step: int, generator: torch.Generator) -> Tensor:
        """[B, 3, t, H, W]: windows of clips at random times, of a random kind (see `pick_kind`).

        Raises ConfigError if the kind has more frames than a clip.
        """
        kind = pick_kind(kinds, step, generator)
        room = self.section.num_frames - kind.frames
        if room < 0:
            raise ConfigError(f"batches of {kind.frames} frames from clips of {self.section.num_frames}")
        seeds = torch.randint(0, 2**31, (kind.batch,), generator=generator).tolist()
        starts = torch.randint(0, room + 1, (kind.batch,), generator=generator).tolist()
        clips = [self.whole(s)[:, :, a : a + kind.frames] for s, a in zip(seeds, starts, strict=True)]
        return torch.cat(clips)


class EncoderTask:
    """Compute the latents of a basis."""

    name = "encoder"

    def __init__(self, section: EncoderSection, vae: Any, basis: Basis, clips: Clips) -> None:
        self.section, self.vae, self.basis, self.clips = section, vae, basis, clips
        self.module = nn.ModuleDict({"encoder": vae.encoder, "quant_conv": vae.quant_conv})

    def losses(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Mean squared error of the normalised latents of one batch of one kind; 1 is to know nothing."""
        video = self.clips.batch(self.section.batches, step, generator)
        return {"total": (encode(self.vae, video) - self.basis.latents(video)).square().mean()}


class DecoderTask:
    """Draw clips from the latents of a basis."""

    name = "decoder"

    def __init__(self, section: DecoderSection, vae: Any, basis: Basis, clips: Clips) -> None:
        self.section, self.vae, self.basis, self.clips = section, vae, basis, clips
        self.module = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})

    def losses(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """l1, l2 and their weighted total on one batch of one kind."""
        video = self.clips.batch(self.section.batches, step, generator)
        latents = self.basis.latents(video)
        latents = latents + self.section.noise * randn(latents.shape, generator)
        error = decode_unclamped(self.vae, latents).float() - video
        l1, l2 = error.abs().mean(), error.square().mean()
        return {"total": self.section.l1 * l1 + self.section.l2 * l2, "l1": l1, "l2": l2}


def encode(vae: Any, video: Tensor) -> Tensor:
    """Mean latents [B, C, T, H, W] float32 of videos."""
    return vae.encode(video).latent_dist.mean.float()


@torch.no_grad()
def psnr(vae: Any, clips: Clips, seeds: Sequence[int]) -> float:
    """Peak signal-to-noise ratio (dB) of reconstructions of whole clips."""
    videos = [clips.whole(s) for s in seeds]
    errors = [(vae.decode(encode(vae, v)).sample - v).square().mean() / 4 for v in videos]
    return float(-10 * torch.log10(torch.stack(errors).mean()))


def pick_kind(kinds: Sequence[ClipMix], step: int, generator: torch.Generator) -> ClipMix:
    """A kind of batch, by weight, among those that have started."""
    started = [k for k in kinds if step >= k.start]
    weights = torch.tensor([k.weight for k in started])
    return started[int(torch.multinomial(weights, 1, generator=generator))]
