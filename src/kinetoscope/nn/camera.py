"""Pictures of the camera's rays as tokens."""

from __future__ import annotations

from torch import Tensor, nn


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
