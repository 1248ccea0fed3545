"""The order of a data set's rows, and batches of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kinetoscope.core.errors import ConfigError, InputError
from kinetoscope.pipelines.stages.validation import VideoGeometry
from kinetoscope.train.data import SourceContext, make_source
from kinetoscope.train.data.buckets import Bucket, Buckets, aspect_sizes
from kinetoscope.train.data.latents import LatentData, LatentSource, Order
from kinetoscope.train.data.preprocess import preprocess
from kinetoscope.train.loop import step_generator
from kinetoscope.train.plugins import Opened
from tiny import make_tiny_wan

ROWS = np.random.default_rng(0).choice(3, (40, 8), p=[0.6, 0.3, 0.1]).tolist()
"""Shape of each row of 40 shards."""


def test_an_epoch_shows_every_row() -> None:
    for batch, alike, mix in ((4, 1, 16), (3, 2, 1), (7, 3, 100)):
        order = Order(ROWS, batch, seed=1, mix=mix, alike=alike)
        for epoch in (0, 2):
            numbers = range(epoch * order.epoch_batches, (epoch + 1) * order.epoch_batches)
            batches = [order.rows(n) for n in numbers]
            shapes = [{ROWS[s][r] for s, r in b} for b in batches]
            assert all(len(shape) == 1 for shape in shapes), "one shape a batch"
            assert all(
                len({*map(tuple, map(sorted, shapes[i : i + alike]))}) == 1 for i in range(0, len(shapes), alike)
            )
            seen = Counter(place for b in batches for place in b)
            assert seen.keys() == {(s, r) for s in range(40) for r in range(8)}
            extra = sum(seen.values()) - 320
            assert extra < 3 * batch * alike and sum(n - 1 for n in seen.values()) == extra


def test_batches_are_functions_of_their_number() -> None:
    """A second order, asked backwards and across epochs, says the same; another seed or epoch says something else."""
    one, two, other = (Order(ROWS, 4, seed=s) for s in (1, 1, 2))
    numbers = list(range(3 * one.epoch_batches))
    forward = {n: one.rows(n) for n in numbers}
    assert {n: two.rows(n) for n in reversed(numbers)} == forward
    assert sum(other.rows(n) == forward[n] for n in numbers) < 3
    first, second = (Counter(p for n in range(e, e + 20) for p in forward[n]) for e in (0, one.epoch_batches))
    assert first != second


def test_rows_are_mixed_near_and_shards_far() -> None:
    """Within an epoch rows of at most `mix` shards are mixed; the order of shards is random."""
    order = Order([[0] * 10] * 50, 10, mix=5)
    batches = [order.rows(n) for n in range(50)]
    assert all(len({s for s, _ in b}) > 1 for b in batches)
    for group in range(10):
        assert len({s for b in batches[5 * group : 5 * group + 5] for s, _ in b}) == 5
    shards = [b[0][0] for b in batches]
    assert abs(np.corrcoef(shards, range(50))[0, 1]) < 0.5
    pairs = Counter(r for b in batches for _, r in b[:1])
    assert len(pairs) > 5, "rows of a shard do not come in order"


def test_few_rows_of_a_shape() -> None:
    order = Order([[0, 1], [0, 0]], 4)
    assert order.epoch_batches == 2
    batches = [order.rows(n) for n in range(2)]
    assert sorted(len(set(b)) for b in batches) == [1, 3]


def test_buckets() -> None:
    geometry = VideoGeometry()
    found = Buckets([(32, 32), (32, 64), (64, 64)], [9, 5], geometry)
    assert [*found][:2] == [Bucket(5, 32, 32), Bucket(5, 32, 64)] and str(Bucket(5, 32, 64)) == "5x32x64"
    for size, expected in {
        (70, 70): (64, 64), (40, 44): (32, 32), (20, 20): (32, 32), (30, 100): (32, 64), (64, 64): (64, 64)
    }.items():  # fmt: skip
        assert found.size_for(*size) == expected, size
    assert found.windows(24, every=True) == [(0, 9), (9, 9), (18, 5)] and found.windows(24, every=False) == [(0, 9)]
    assert found.windows(8, every=True) == [(0, 5)] and found.windows(4, every=True) == []
    assert aspect_sizes((480, 832), [(16, 9), (1, 1), (9, 16)], 16) == ((480, 848), (624, 624), (848, 480))
    with pytest.raises(InputError, match="at least one"):
        Buckets([], [5], geometry)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and a data set of five clips of two shapes."""
    folder = tmp_path_factory.mktemp("data")
    model = make_tiny_wan(folder / "model")
    preprocess(
        model, "world:shapes", folder / "set", clips=5, sizes=[(32, 32), (32, 48)], frames=[5], fps=12.0, shard=2
    )
    return model, folder / "set"


def source(model: Path, path: Path, **settings: Any) -> LatentSource:
    section = LatentData(source="latents", path=str(path), **settings)
    found = make_source(section, SourceContext(Opened(str(model)), path))
    assert isinstance(found, LatentSource)
    return found


def test_batches_are_rows(made: tuple[Path, Path]) -> None:
    model, path = made
    loader = source(model, path, batch=2)
    encode = Opened(str(model)).encoder()
    seen: Counter[str] = Counter()
    for step in range(loader.order.epoch_batches):
        batch = loader.batch(step, step_generator(0, step))
        rows = [loader.data.row(*p) for p in loader.order.rows(step)]
        text = encode(list(batch.captions))
        assert torch.equal(batch.text.states, text.states) and torch.equal(batch.text.lengths, text.lengths)
        assert torch.equal(batch.latents, torch.stack([r["latents"] for r in rows]))
        assert batch.captions == tuple(r["caption"] for r in rows) and batch.latents.dtype == torch.float32
        seen.update(r["key"] for r in rows)
    assert len(seen) == 5 and len({loader.batch(s, step_generator(0, s)).latents.shape for s in range(3)}) == 2


def test_data_of_another_model_are_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    _, path = made
    other = make_tiny_wan(tmp_path / "other", seed=5)
    with pytest.raises(ConfigError, match=r"made with another VAE and text encoder \(of .*model\) than that of"):
        source(other, path)
    empty = tmp_path / "empty"
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x.mp4").write_bytes(b"nothing")
    preprocess(other, tmp_path / "in", empty, sizes=[(32, 32)], frames=[5])
    with pytest.raises(ConfigError, match="holds no rows"):
        source(other, empty)
