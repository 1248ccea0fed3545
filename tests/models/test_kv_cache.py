"""The rolling K/V cache against the published in-place arithmetic."""

from __future__ import annotations

import pytest
import torch

from kinetoscope.core.errors import InputError
from kinetoscope.engine.protocols import take_rows
from kinetoscope.nn.kv_cache import KVCache


class InPlace:
    """A fixed buffer that rolls to the left, as published rollouts keep it: the slow oracle."""

    def __init__(self, size: int, sink: int) -> None:
        self.buffer = torch.zeros(1, size, 1, 1)
        self.sink, self.local_end, self.global_end = sink, 0, 0

    def write(self, new: torch.Tensor, start: int) -> torch.Tensor:
        size, n, end = self.buffer.shape[1], new.shape[1], start + new.shape[1]
        evicted = 0
        if end > self.global_end and n + self.local_end > size:
            evicted = n + self.local_end - size
            rolled = self.local_end - evicted - self.sink
            moved = self.buffer[:, self.sink + evicted : self.sink + evicted + rolled].clone()
            self.buffer[:, self.sink : self.sink + rolled] = moved
        self.local_end += end - self.global_end - evicted
        self.global_end = end
        self.buffer[:, self.local_end - n : self.local_end] = new
        return self.buffer[:, : self.local_end].clone()


@pytest.mark.parametrize(("capacity", "sink", "block"), [(6, 0, 3), (4, 0, 3), (7, 2, 3), (5, 1, 4), (12, 0, 1)])
def test_rolls_as_the_in_place_buffer(capacity: int, sink: int, block: int) -> None:
    oracle = InPlace(capacity, sink)
    cache = KVCache.empty((1,), 1, 1, capacity=capacity, sink=sink)
    for index in range(7):
        for step in range(3):  # noisy passes overwrite their place; only the last is remembered
            new = torch.full((1, block, 1, 1), 100.0 * step) + torch.arange(block).view(1, -1, 1, 1) + 10 * index
            keys, values = cache.join(new, -new)
            torch.testing.assert_close(keys, oracle.write(new, index * block), rtol=0, atol=0)
            assert torch.equal(values, -keys)
        cache = cache.append(new, -new)
        assert cache.end == (index + 1) * block


def test_without_bound_remembers_all() -> None:
    cache = KVCache.empty((2, 3), 1, 4)
    for _ in range(5):
        cache = cache.append(torch.ones(2, 3, 2, 1, 4), torch.ones(2, 3, 2, 1, 4))
    assert cache.keys.shape == (2, 3, 10, 1, 4)


def test_a_value_that_is_cut_by_rows() -> None:
    empty = KVCache.empty((4,), 1, 1, capacity=3)
    cache = empty.append(torch.arange(4.0).view(4, 1, 1, 1), torch.zeros(4, 1, 1, 1))
    assert empty.keys.shape[1] == 0, "appending made a new value"
    part = take_rows(cache, slice(1, 3))
    assert isinstance(part, KVCache)
    assert part.keys.flatten().tolist() == [1.0, 2.0]
    assert (part.capacity, part.end) == (3, 1)


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(InputError, match="block of 4 tokens"):
        KVCache.empty((1,), 1, 1, capacity=3).join(torch.zeros(1, 4, 1, 1), torch.zeros(1, 4, 1, 1))
    with pytest.raises(InputError, match="sink of 3"):
        KVCache.empty((1,), 1, 1, capacity=3, sink=3)
