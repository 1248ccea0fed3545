"""Pictures of the camera's rays as tokens, and what control models add to those of the video."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from kinetoscope.core.errors import InputError


class ResidualConvolutions(nn.Module):
    """x + conv(relu(conv(x))), 3 x 3."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, d, H, W] -> [N, d, H, W]"""
        return x + self.conv2(self.conv1(x).relu())


class CameraAdapter(nn.Module):
    """Features at the resolution of the video, frame by frame, to the token grid (Wan-Fun's `SimpleAdapter`).

    Args:
        in_dim: channels of a frame.
        dim: width of the tokens.
        patch: latent rows and columns that a token covers.
        downscale: pixels that a latent row or column covers.
    """

    def __init__(self, in_dim: int, dim: int, patch: tuple[int, int], downscale: int) -> None:
        super().__init__()
        self.fold = nn.PixelUnshuffle(downscale)
        self.conv = nn.Conv2d(in_dim * downscale**2, dim, kernel_size=patch, stride=patch)
        self.residual_blocks = nn.Sequential(ResidualConvolutions(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[R, C, T, H, W] -> [R, d, T, h, w]"""
        frames = x.transpose(1, 2)  # [R, T, C, H, W]
        out = self.residual_blocks(self.conv(self.fold(frames.flatten(0, 1))))  # [R T, d, h, w]
        return out.unflatten(0, frames.shape[:2]).transpose(1, 2)


class Controls(NamedTuple):
    """What control models add to the tokens; rows first."""

    camera: Tensor | None = None  # [R, d, T', H', W'] added to the tokens
    reference: Tensor | None = None  # [R, d, 1, H', W'] a frame before the first


def add_controls(x: Tensor, controls: Controls) -> Tensor:
    """[R, d, T', H', W'] -> the same with a camera, one frame more with a reference"""
    if controls.camera is not None:
        if controls.camera.shape != x.shape:
            told, grid = list(controls.camera.shape[2:]), list(x.shape[2:])
            raise InputError(f"the camera's rays make tokens {told}, the video {grid}; give every frame its rays")
        x = x + controls.camera
    return x if controls.reference is None else torch.cat([controls.reference, x], 2)
