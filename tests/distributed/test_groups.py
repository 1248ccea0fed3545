"""Layouts, groups and what is sent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from distributed.ranks import run_ranks
from kinetoscope.core.errors import ConfigError
from kinetoscope.parallel import Groups, ParallelConfig
from kinetoscope.parallel.comm import SENT, all_gather, all_reduce, all_to_all, broadcast, pass_on


def test_a_layout_from_text_and_mapping() -> None:
    config = ParallelConfig.of("ulysses=2, cfg=2,fsdp=true")
    assert config == ParallelConfig.of({"ulysses": 2, "cfg": 2, "fsdp": True}) == ParallelConfig.of(config)
    assert (config.world, config.ranks, config.sequence, config.shape) == (4, 4, 2, (1, 2, 1, 2, 1))
    assert ParallelConfig.of(str(config)) == config and ParallelConfig.of(config.as_dict()) == config
    assert ParallelConfig.of(None).world == 1 and str(ParallelConfig()) == "one device"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("ulises=2", "unknown degree 'ulises'; did you mean ulysses?"),
        ("tp=0", "tp=0 is not a positive whole number"),
        ("tp=two", "tp='two' is not a positive whole number"),
        ("tp", "'tp' is not of the form name=N"),
        ("tp=2,tp=2", "'tp=2' is given twice"),
        ("tp=2,vae=3", "vae=3 does not divide the 2 devices of a replica"),
        ({"tp": True}, "tp=True is not a positive whole number"),
        ({"fsdp": 1}, "fsdp=1 is not true or false"),
    ],
)
def test_a_wrong_layout_is_named(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match="parallel") as error:
        ParallelConfig.of(value)
    assert message in str(error.value)


def places(groups: Groups) -> dict[str, tuple[int, ...]]:
    names = ("replica", "cfg", "ring", "ulysses", "tp", "sequence", "shard", "vae", "everyone")
    for name in names:
        group = getattr(groups, name)
        assert group.ranks[group.index] == groups.rank and group.size == len(group.ranks)
    return {name: getattr(groups, name).ranks for name in names}


def test_groups_follow_the_axes() -> None:
    found = run_ranks("cfg=2,ulysses=2,vae=4", places)
    assert found[1] == {
        "replica": (1,), "cfg": (1, 3), "ring": (1,), "ulysses": (0, 1), "tp": (1,), "sequence": (0, 1),
        "shard": (0, 1, 2, 3), "vae": (0, 1, 2, 3), "everyone": (0, 1, 2, 3),
    }  # fmt: skip
    found = run_ranks("replicas=2,tp=2,vae=2", places)
    assert found[2]["tp"] == found[2]["vae"] == found[2]["everyone"] == (2, 3) and found[2]["replica"] == (0, 2)


def talk(groups: Groups) -> dict[str, Any]:
    SENT.clear()
    rank, group = groups.rank, groups.ulysses
    x = torch.arange(24.0).view(4, 6) + 100 * rank
    return {
        "turned": all_to_all(x, group, scatter=0, gather=1),
        "back": all_to_all(all_to_all(x, group, scatter=0, gather=1), group, scatter=1, gather=0),
        "gathered": all_gather(x[:1], group, dim=0),
        "sum": all_reduce(x.clone(), group),
        "told": broadcast(x.clone(), group, source=1),
        "passed": pass_on([x, x[:1]], group),
        "sent": dict(SENT),
    }


def test_what_is_said_and_counted() -> None:
    a, b = run_ranks("ulysses=2", talk)
    x, y = np.arange(24.0).reshape(4, 6), np.arange(24.0).reshape(4, 6) + 100
    np.testing.assert_array_equal(a["turned"], np.concatenate([x[:2], y[:2]], 1))
    np.testing.assert_array_equal(b["turned"], np.concatenate([x[2:], y[2:]], 1))
    for got, own in ((a, x), (b, y)):
        np.testing.assert_array_equal(got["back"], own)
        np.testing.assert_array_equal(got["gathered"], np.concatenate([x[:1], y[:1]]))
        np.testing.assert_array_equal(got["sum"], x + y)
        np.testing.assert_array_equal(got["told"], y)
    np.testing.assert_array_equal(a["passed"][0], y)
    np.testing.assert_array_equal(b["passed"][1], x[:1])
    half, row, whole = 48, 24, 96  # bytes
    common = 3 * half + row + whole + whole + row
    assert a["sent"] == {"ulysses": common} and b["sent"] == {"ulysses": common + whole}
