"""Weights shared out by FSDP2, alone and with tensor parallel, against the model on one device."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distributed.opened import open_among
from distributed.ranks import run_ranks
from distributed.sharded import FAMILIES, Case, errors, held_bytes, make_case, shared_out
from distributed.test_tensor import check_videos, gradients
from kinetoscope.core.errors import CompositionError
from kinetoscope.core.sharding import Cut, ShardPlan, take
from kinetoscope.parallel import Groups
from kinetoscope.parallel.comm import SENT
from kinetoscope.parallel.fsdp import NAME
from runtime.families import FAMILIES as PIPELINES
from tiny import make_tiny_wan

QUICK = ("wan-image", "cosmos", "hunyuan-replace", "longcat-vc")


def own_parts(groups: Groups, cases: list[Case]) -> dict[str, Any]:
    return errors(groups, cases)


def check(names: tuple[str, ...], parallel: str, error: float, most: float) -> None:
    cases = [make_case(name) for name in names]
    for rank in run_ranks(parallel, own_parts, cases):
        for case in cases:
            whole, found = held_bytes(case.model), rank[case.name]
            assert found["error"] <= error, (case.name, found)
            assert found["held"] == found["after"] < most * whole or case.name == "wan-camera", (case.name, found)


def test_forwards_with_gathered_weights_are_equal() -> None:
    """Bit for bit: each device computes what one device does, with weights that are there for the time of a block."""
    check(QUICK, "cfg=2,fsdp=true", 0.0, 0.65)


def test_with_tensor_parallel() -> None:
    """Each of the parts of tensor parallel is shared out again: four devices hold about a quarter each."""
    check(("wan",), "ulysses=2,tp=2,fsdp=true", 1e-5, 0.3)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("parallel", "error", "most"),
    [("ring=2,fsdp=true", 0.0, 0.65), ("cfg=2,ulysses=2,fsdp=true", 0.0, 0.5), ("cfg=2,tp=2,fsdp=true", 1e-5, 0.5)],
)
def test_every_family(parallel: str, error: float, most: float) -> None:
    check(tuple(FAMILIES), parallel, error, most)


@pytest.mark.parametrize(
    ("parallel", "names"),
    [
        ("ulysses=2,fsdp=true", ["wan"]),
        *(pytest.param(p, ["wan", "hunyuan", "longcat-vc"], marks=pytest.mark.distributed)
          for p in ("cfg=2,fsdp=true", "ring=2,fsdp=true", "replicas=2,ulysses=2,fsdp=true")),
    ],
)  # fmt: skip
def test_gradients_of_gathered_weights(parallel: str, names: list[str]) -> None:
    """Each device has its rows of the gradient of a matrix, and the whole of all others."""
    for name in names:
        case = make_case(name)
        expected = gradients(None, case)
        for index, rank in enumerate(run_ranks(parallel, gradients, case)):
            shared = 0
            for weight, grad in rank.items():
                one = expected[weight]
                if grad.shape != one.shape:
                    one, shared = take(one, one.shape, [Cut(0, index % 2, 2)]), shared + 1
                torch.testing.assert_close(torch.as_tensor(grad), one, rtol=1e-3, atol=1e-6, msg=weight)
            assert shared > 10, name


def sent_in_a_forward(groups: Groups, case: Case) -> int:
    model = shared_out(groups, case)
    SENT.clear()
    with torch.no_grad():
        model(**case.inputs)
    return SENT[NAME]


def test_bytes_sent_are_those_of_the_formula() -> None:
    """Every matrix once, a device's part to each of the others; the text's keys and values gather the blocks again."""
    case = make_case("wan")
    linear = {n: m.weight.nbytes for n, m in case.model.named_modules() if isinstance(m, nn.Linear)}
    blocks = sum(v for n, v in linear.items() if n.startswith("blocks."))
    expected = (sum(linear.values()) + blocks) // 2
    assert run_ranks("cfg=2,fsdp=true", sent_in_a_forward, case) == [expected] * 2


def without_gathering(groups: Groups, case: Case) -> str:
    blind = copy.copy(case)
    blind.plan = ShardPlan(case.plan.styles, outside=())
    with pytest.raises(RuntimeError) as error:
        shared_out(groups, blind)(**case.inputs)
    return str(error.value)


def test_a_call_outside_of_the_blocks_that_is_not_declared_fails() -> None:
    """It does not run with a part of the weights."""
    for message in run_ranks("cfg=2,fsdp=true", without_gathering, make_case("wan")):
        assert "DTensor" in message


def test_a_video_with_shared_weights_and_shared_branches(tmp_path: Path) -> None:
    """Branches on two devices, and between them the weights; read from the files part by part."""
    check_videos(tmp_path, "wan", "cfg=2,fsdp=true", 0.65)


@pytest.mark.distributed
@pytest.mark.parametrize("family", [f for f in PIPELINES if f != "wan"])
def test_videos_of_every_family(tmp_path: Path, family: str) -> None:
    check_videos(tmp_path, family, "ulysses=2,fsdp=true", 0.65)


@pytest.mark.distributed
@pytest.mark.parametrize("parallel", ["cfg=2,tp=2,fsdp=true", "ulysses=2,tp=2,fsdp=true", "ulysses=2,tp=2"])
def test_videos_of_four_devices(tmp_path: Path, parallel: str) -> None:
    check_videos(tmp_path, "wan", parallel, 0.75)


@pytest.mark.distributed
@pytest.mark.parametrize("cache", ["fbcache:threshold=0.9", "taylorseer:interval=2,warmup=1"])
def test_step_caches_with_shared_weights(tmp_path: Path, cache: str) -> None:
    check_videos(tmp_path, "wan", "ulysses=2,tp=2,fsdp=true", 0.75, cache=cache)


def refused(groups: Groups, path: Path) -> list[str]:
    found: list[str] = []
    for options in ({"offload": "blocks"}, {"quantize": "int8"}):
        with pytest.raises(CompositionError) as error:
            open_among(groups, path, **options)
        found.append(str(error.value))
    return found


@pytest.mark.parametrize("parallel", ["tp=2", "cfg=2,fsdp=true"])
def test_what_does_not_go_together_is_named(tmp_path: Path, parallel: str) -> None:
    for messages in run_ranks(parallel, partial(refused, path=make_tiny_wan(tmp_path / "wan"))):
        for message, option in zip(messages, ("offload='blocks'", "quantize='int8'"), strict=True):
            assert option in message and ("tp=2" in message or "fsdp=true" in message)
