"""The latent space of reference models: principal components, checked by their definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kinetoscope.core.errors import ConfigError
from kinetoscope.train.basis import Basis, fit_basis
from kinetoscope.train.loop import step_generator

SPATIAL, TEMPORAL = 2, 4
SIZE = 3 * TEMPORAL * SPATIAL**2


def clip(seed: int) -> torch.Tensor:
    """Correlated noise [1, 3, 9, 4, 6]."""
    noise = torch.empty(1, 3, 9, 4, 6).normal_(generator=step_generator(7, seed))
    return 0.1 * noise + 0.3 * noise.mean((2, 3), keepdim=True) + 0.2


def basis(channels: int) -> Basis:
    return fit_basis(clip, 30, channels, SPATIAL, TEMPORAL, 0)


def blocks_by_hand(video: torch.Tensor) -> np.ndarray:
    """All blocks of a clip as rows, in plain loops: (time, y, x) order inside, colours last."""
    v = video[0].numpy()
    frames = [v[:, :1].repeat(TEMPORAL, 1)] + [v[:, a : a + TEMPORAL] for a in range(1, v.shape[1], TEMPORAL)]
    rows = []
    for part in frames:
        for y in range(0, v.shape[2], SPATIAL):
            for x in range(0, v.shape[3], SPATIAL):
                rows.append(part[:, :, y : y + SPATIAL, x : x + SPATIAL].transpose(1, 2, 3, 0).ravel())
    return np.stack(rows)


def test_it_is_the_principal_components() -> None:
    ours = basis(5)
    rows = np.concatenate([blocks_by_hand(clip(i)) for i in range(30)]).astype(np.float64)
    _, s, vt = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    assert np.allclose(ours.deviation.numpy(), s[:5] / np.sqrt(len(rows)), rtol=1e-4)
    assert np.allclose(np.abs(np.sum(ours.directions.numpy().T * vt[:5], 1)), 1, atol=1e-3)
    expected = (blocks_by_hand(clip(3)) - ours.mean.numpy()) @ ours.directions.numpy() / ours.deviation.numpy()
    latents = ours.latents(clip(3))  # [1, 5, 3, 2, 3]
    assert latents.shape == (1, 5, 3, 2, 3)
    assert np.allclose(latents[0].permute(1, 2, 3, 0).reshape(-1, 5), expected, atol=1e-4)


def test_all_components_give_the_clip_back() -> None:
    complete = fit_basis(clip, 60, SIZE, SPATIAL, TEMPORAL, 0)
    back = complete.video(complete.latents(clip(99)))
    torch.testing.assert_close(back, clip(99), rtol=0, atol=1e-3)
    fewer = basis(5)
    assert (fewer.video(fewer.latents(clip(99))) - clip(99)).square().mean() > 1e-4


def test_latents_are_normalised() -> None:
    ours = basis(5)
    latents = torch.cat([ours.latents(clip(i)) for i in range(30)])
    torch.testing.assert_close(latents.std((0, 2, 3, 4)), torch.ones(5), rtol=0, atol=0.02)
    assert latents.mean((0, 2, 3, 4)).abs().max() < 1e-3


def test_less_whitening_leaves_larger_components_larger() -> None:
    """Latents stand for the same clips, at deviations d^(1 - w) over their root mean square."""
    plain = basis(5)
    for whitening in (0.0, 0.5):
        ours = fit_basis(clip, 30, 5, SPATIAL, TEMPORAL, 0, whitening)
        expected = plain.deviation ** (1 - whitening)
        latents = torch.cat([ours.latents(clip(i)) for i in range(30)])
        deviations = latents.std((0, 2, 3, 4))
        torch.testing.assert_close(deviations, expected / expected.square().mean().sqrt(), rtol=0.02, atol=0)
        torch.testing.assert_close(ours.video(latents[:1]), plain.video(plain.latents(clip(0))), rtol=0, atol=1e-5)
    assert torch.equal(plain.scale, plain.deviation)


def test_more_channels_than_numbers() -> None:
    with pytest.raises(ConfigError, match="lower z_dim"):
        basis(SIZE + 1)
