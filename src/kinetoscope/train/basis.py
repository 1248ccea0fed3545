"""The latent space of a reference model: principal components of blocks of pixels, known before anything is trained.

One latent position holds the leading components of its block of temporal x spatial x spatial pixels; the first frame
stands alone in time and counts as a still block. Such latents move smoothly with what they show, which is what makes
them easy to denoise (docs/decisions/reference-training.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kinetoscope.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Basis:
    """A linear map between clips and normalised latents.

    Attributes:
        spatial, temporal: sides of a block in pixels and in frames.
        mean: [D], D = temporal * spatial * spatial * 3.
        directions: [D, C], orthonormal, by falling variance.
        deviation: [C], of the components.
        whitening: 1: latents of all components have deviation 1; below, what shows more in pixels is larger and the
            last to drown in noise, up to 0: as in pixels. The mean square of all latents is 1 in any case.
    """

    spatial: int
    temporal: int
    mean: Tensor
    directions: Tensor
    deviation: Tensor
    whitening: float = 1.0

    @property
    def scale(self) -> Tensor:
        """[C], what components are divided by."""
        part = self.deviation**self.whitening
        return part * (self.deviation / part).square().mean().sqrt()

    def latents(self, video: Tensor) -> Tensor:
        """Clips [B, 3, 1 + 4 n, H, W] in [-1, 1] -> normalised latents [B, C, 1 + n, h, w] (for 4 frames a block)."""
        parts = _blocks(video, self.spatial, self.temporal) - self.mean  # [B, t, h, w, D]
        return (parts @ self.directions / self.scale).permute(0, 4, 1, 2, 3)

    def video(self, latents: Tensor) -> Tensor:
        """The clips [B, 3, T, H, W] that latents [B, C, t, h, w] stand for: the best linear reconstruction."""
        parts = (latents.permute(0, 2, 3, 4, 1) * self.scale) @ self.directions.T + self.mean
        b, t, h, w, _ = parts.shape
        s, f = self.spatial, self.temporal
        x = parts.view(b, t, h, w, f, s, s, 3).permute(0, 7, 1, 4, 2, 5, 3, 6)  # [B, 3, t, f, h, s, w, s]
        return x.reshape(b, 3, t * f, h * s, w * s)[:, :, f - 1 :]


def fit_basis(
    clip: Callable[[int], Tensor],
    clips: int,
    channels: int,
    spatial: int,
    temporal: int,
    seed: int,
    whitening: float = 1.0,
) -> Basis:
    """Principal components of the blocks of `clip(seed)`, `clip(seed + 1)`, ... (each [1, 3, T, H, W] in [-1, 1]).

    Raises ConfigError if a block has fewer numbers than there are `channels`.
    """
    size = 3 * temporal * spatial**2
    if channels > size:
        raise ConfigError(f"blocks of {size} numbers have no {channels} components; lower z_dim")
    total, square, count = torch.zeros(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64), 0
    for i in range(clips):
        parts = _blocks(clip(seed + i), spatial, temporal).reshape(-1, size).double()
        total += parts.sum(0)
        square += parts.T @ parts
        count += len(parts)
    mean = total / count
    variance, directions = torch.linalg.eigh(square / count - mean[:, None] * mean)
    directions = directions.flip(1)[:, :channels]
    directions = directions * directions.sum(0).sign()  # eigenvectors come with an arbitrary sign
    deviation = variance.flip(0)[:channels].clamp(min=1e-12).sqrt()
    return Basis(spatial, temporal, mean.float(), directions.float().contiguous(), deviation.float(), whitening)


def _blocks(video: Tensor, s: int, f: int) -> Tensor:
    """[B, 3, T, H, W] -> [B, t, h, w, f s s 3]; the first frame is shown f times."""
    x = torch.cat([video[:, :, :1].repeat(1, 1, f - 1, 1, 1), video], 2)
    b, _, frames, height, width = x.shape
    x = x.view(b, 3, frames // f, f, height // s, s, width // s, s).permute(0, 2, 4, 6, 3, 5, 7, 1)
    return x.reshape(b, frames // f, height // s, width // s, -1)
