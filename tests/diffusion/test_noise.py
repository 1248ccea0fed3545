"""Noise is the same whatever the batch, and the first draw is diffusers'."""

from __future__ import annotations

import torch
from diffusers.utils.torch_utils import randn_tensor

from kinetoscope.diffusion.noise import NoiseSource


def test_first_draw_is_that_of_diffusers() -> None:
    shape = (16, 3, 4, 6)
    ours = NoiseSource([7]).draw(shape)
    theirs = randn_tensor((1, *shape), generator=torch.Generator("cpu").manual_seed(7), dtype=torch.float32)
    assert torch.equal(ours, theirs)


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    together, alone = NoiseSource([3, 9, 4]), NoiseSource([9])
    for _ in range(3):
        assert torch.equal(together.draw((2, 5))[1:2], alone.draw((2, 5)))


def test_forks_are_reproducible_distinct_and_leave_the_parent_alone() -> None:
    source = NoiseSource([1])
    draws = [source.fork(*key).draw((64,)) for key in ((0,), (1,), (0, 0), (1, 0), (0, 1))]
    assert all(not torch.allclose(a, b) for i, a in enumerate(draws) for b in draws[:i])
    assert torch.equal(source.fork(1).draw((64,)), draws[1])
    assert torch.equal(source.draw((64,)), NoiseSource([1]).draw((64,)))
    assert all(0 <= s < 2**63 for s in source.fork(5).seeds)
