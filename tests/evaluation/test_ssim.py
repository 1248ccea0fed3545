"""SSIM and MS-SSIM against pytorch-msssim, and against the formula written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_msssim import ms_ssim as oracle_ms_ssim
from pytorch_msssim import ssim as oracle_ssim

from kinetoscope.core.errors import InputError
from kinetoscope.evaluation.ssim import SCALE_WEIGHTS, scales_of, similarity

Array = np.ndarray[Any, Any]


def video(seed: int, frames: int, height: int, width: int) -> Array:
    """Smooth patterns with noise, so that every scale has something to see."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    t = np.arange(frames)[:, None, None, None]
    waves = np.stack([np.sin(x / 7 + k) * np.cos(y / (5 + k)) for k in range(3)], -1)
    return np.clip(128 + 70 * np.cos(t / 2) * waves + rng.normal(0, 12, (frames, height, width, 3)), 0, 255).astype(
        np.uint8
    )


def disturbed(frames: Array, seed: int, amount: float) -> Array:
    rng = np.random.default_rng(seed)
    return np.clip(frames + rng.normal(0, amount, frames.shape) + 3, 0, 255).astype(np.uint8)


def tensors(*videos: Array) -> list[torch.Tensor]:
    return [torch.from_numpy(v).permute(0, 3, 1, 2).double() for v in videos]


@pytest.mark.parametrize("size", [(11, 11), (17, 40), (64, 64), (96, 51)])
@pytest.mark.parametrize("amount", [2.0, 40.0])
def test_ssim_is_pytorch_msssims(size: tuple[int, int], amount: float) -> None:
    a = video(1, 3, *size)
    b = disturbed(a, 2, amount)
    got = similarity(a, b).ssim
    expected = oracle_ssim(*tensors(a, b), data_range=255, size_average=False).numpy()
    assert got is not None
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)  # its window is float32
    assert got.std() > 0 and (got < 0.999).all()


@pytest.mark.parametrize("size", [(176, 176), (192, 256)])
def test_ms_ssim_is_pytorch_msssims(size: tuple[int, int]) -> None:
    a = video(3, 2, *size)
    b = disturbed(a, 4, 25.0)
    got = similarity(a, b)
    expected = oracle_ms_ssim(*tensors(a, b), data_range=255, size_average=False).numpy()
    assert got.scales == 5 and got.ms_ssim is not None
    np.testing.assert_allclose(got.ms_ssim, expected, rtol=0, atol=2e-6)


def by_hand(a: Array, b: Array) -> tuple[Array, Array]:
    """Mean over channels and positions of SSIM and of contrast times structure, one window at a time."""
    taps = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    w = np.outer(taps, taps) / np.outer(taps, taps).sum()
    whole, contrast = [], []
    for c in range(3):
        for top in range(a.shape[0] - 10):
            for left in range(a.shape[1] - 10):
                x, y = (v[top : top + 11, left : left + 11, c].astype(float) for v in (a, b))
                mx, my = (w * x).sum(), (w * y).sum()
                vx, vy, vxy = (w * (x - mx) ** 2).sum(), (w * (y - my) ** 2).sum(), (w * (x - mx) * (y - my)).sum()
                cs = (2 * vxy + 7.65**2) / (vx + vy + 7.65**2)
                contrast.append(cs)
                whole.append(cs * (2 * mx * my + 2.55**2) / (mx**2 + my**2 + 2.55**2))
    return np.mean(np.reshape(whole, (3, -1)), 1), np.mean(np.reshape(contrast, (3, -1)), 1)


def test_small_frames_use_fewer_scales() -> None:
    """23 pixels hold two scales; the oracle takes none but five, so the formula is written out."""
    a = video(5, 1, 23, 30)
    b = disturbed(a, 6, 15.0)
    half = [v[0, :22].astype(float).reshape(11, 2, 15, 2, 3).mean((1, 3)) for v in (a, b)]
    weights = np.array(SCALE_WEIGHTS[:2]) / sum(SCALE_WEIGHTS[:2])
    fine, coarse = by_hand(a[0], b[0]), by_hand(half[0], half[1])
    got = similarity(a, b)
    assert got.scales == 2 and got.ms_ssim is not None and got.ssim is not None
    np.testing.assert_allclose(got.ssim, fine[0].mean(), rtol=1e-9)
    np.testing.assert_allclose(got.ms_ssim, (fine[1] ** weights[0] * coarse[0] ** weights[1]).mean(), rtol=1e-9)


@pytest.mark.parametrize(
    ("size", "scales"),
    [((10, 400), 0), ((11, 400), 1), ((21, 21), 1), ((22, 22), 2), ((64, 64), 3), ((175, 300), 4), ((176, 176), 5)],
)
def test_scales(size: tuple[int, int], scales: int) -> None:
    assert scales_of(*size) == scales


def test_frames_smaller_than_the_window_have_none() -> None:
    a = video(0, 2, 10, 32)
    assert similarity(a, a).ssim is None and similarity(a, a).ms_ssim is None


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), height=st.integers(11, 50), width=st.integers(11, 50))
def test_equal_frames_are_exactly_one_and_order_does_not_matter(seed: int, height: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = (rng.integers(0, 256, (1, height, width, 3), dtype=np.uint8) for _ in "ab")
    same = similarity(a, a)
    assert same.ssim is not None and same.ms_ssim is not None
    assert same.ssim.tolist() == [1.0] and same.ms_ssim.tolist() == [1.0]
    there, back = similarity(a, b), similarity(b, a)
    assert there.ssim is not None and back.ssim is not None
    np.testing.assert_allclose(there.ssim, back.ssim, rtol=1e-12)
    assert there.ssim[0] < 0.5


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (np.zeros((3, 16, 16, 3), np.uint8), "frames"),
        (np.zeros((2, 16, 18, 3), np.uint8), "16x16 against 16x18"),
        (np.zeros((2, 16, 16, 3), np.float32), "uint8"),
        (np.zeros((0, 16, 16, 3), np.uint8), "uint8"),
    ],
)
def test_what_cannot_be_compared_is_refused(other: Array, says: str) -> None:
    with pytest.raises(InputError, match=says):
        similarity(np.zeros((2, 16, 16, 3), np.uint8), other)
