"""The ring of keys and values against the published buffer that rolls to the left."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kinetoscope.core.errors import InputError
from kinetoscope.engine.protocols import take_rows
from kinetoscope.nn.ring_cache import RingCache


class Rolling:
    """A fixed buffer whose middle moves when it is full, as published rollouts keep it: the slow oracle."""

    def __init__(self, size: int, sink: int) -> None:
        self.buffer = torch.zeros(size)
        self.sink, self.local_end, self.global_end = sink, 0, 0

    def write(self, new: Tensor, start: int) -> Tensor:
        size, n, end = len(self.buffer), len(new), start + len(new)
        evicted = 0
        if end > self.global_end and n + self.local_end > size:
            evicted = n + self.local_end - size
            rolled = self.local_end - evicted - self.sink
            moved = self.buffer[self.sink + evicted : self.sink + evicted + rolled].clone()
            self.buffer[self.sink : self.sink + rolled] = moved
        self.local_end += end - self.global_end - evicted
        self.global_end = end
        self.buffer[self.local_end - n : self.local_end] = new
        return self.buffer[: self.local_end]


def frames(values: Tensor) -> Tensor:
    """[n] -> [R=2, n, M=2, H=1, D=1], the second row negative."""
    one = values.view(1, -1, 1, 1, 1).expand(1, -1, 2, 1, 1)
    return torch.cat([one, -one])


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(
    ("size", "sink", "blocks"),
    [
        (6, 0, [3] * 7),
        (4, 0, [3] * 7),
        (7, 2, [3] * 7),
        (5, 1, [4] * 6),
        (4, 3, [1] * 9),
        (6, 2, [1, 2, 4, 3, 1, 4]),
    ],
)
def test_sees_what_the_rolling_buffer_sees(size: int, sink: int, blocks: list[int], gradient: bool) -> None:
    oracle = Rolling(size, sink)
    cache = RingCache.allocate(1, (2, size, 2, 1, 1), sink=sink)
    start = 0
    for count in blocks:
        for step in range(3):  # noisy passes write over their place; the last one stays
            new = torch.arange(start, start + count).float() + 100 * (2 - step) + 1
            keys = frames(new).requires_grad_(gradient)
            seen, values = cache.update(0, keys, 2 * keys, start)
            expected = oracle.write(new, start)
            assert seen.shape == (2, len(expected), 2, 1, 1)
            assert torch.equal(seen[0, :, 0].flatten().sort().values, expected.sort().values)
            assert torch.equal(seen[0], -seen[1]) and torch.equal(values, 2 * seen)
            if gradient:
                (grad,) = torch.autograd.grad(seen.sum(), keys)
                assert torch.equal(grad, torch.ones_like(keys)), "the own block has gradients, the past none"
        start += count


def test_a_cut_is_a_view() -> None:
    cache = RingCache.allocate(2, (3, 4, 1, 1, 1), sink=1)
    part = take_rows(cache, slice(1, 2))
    assert isinstance(part, RingCache) and part.sink == 1
    ones = torch.ones(1, 2, 1, 1, 1)
    part.update(1, ones, ones, 0)
    assert cache.keys[1].flatten(1).tolist() == [[0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert not cache.keys[0].any()


def test_refusals() -> None:
    with pytest.raises(InputError, match="sink of 3"):
        RingCache.allocate(1, (1, 3, 1, 1, 1), sink=3)
    with pytest.raises(InputError, match="block of 3 frames"):
        RingCache.allocate(1, (1, 4, 1, 1, 1), sink=2).runs(2, 3)
