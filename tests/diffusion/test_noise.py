"""Noise is the same whatever the batch, and the first draw is diffusers'."""

from __future__ import annotations

import torch
from diffusers.utils.torch_utils import randn_tensor

from kinetoscope.core.errors import InputError
from kinetoscope.diffusion.noise import NoiseSource
from kinetoscope.pipelines.stages.validation import check_text


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


def test_accepted_seeds_that_differ_have_different_noise() -> None:
    """torch's CPU generator reads 32 bits of a seed, so larger ones are refused, with the one that they would equal."""
    accepted: list[int] = []
    for seed in (0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**40, 2**63 - 1):
        try:
            check_text("a prompt", seed)
        except InputError as error:
            same = int(str(error).partition("; seed=")[2].split()[0])
            assert torch.equal(NoiseSource([seed]).draw((4,)), NoiseSource([same]).draw((4,)))
        else:
            accepted.append(seed)
    assert accepted == [0, 1, 2**31, 2**32 - 1]
    draws = [noise.draw((4,)) for s in accepted for noise in (NoiseSource([s]), NoiseSource([s]).fork(3))]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])
