"""Naming a sparse kind: which roles it serves, what is refused, and when layers use it."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from kinetoscope.attention import Role, attention, capabilities, make_sparse, resolve_attention
from kinetoscope.attention.default import default_attention
from kinetoscope.attention.sparse.base import Trained
from kinetoscope.core.context import ForwardContext, forward_context
from kinetoscope.core.errors import CompositionError, ConfigError, InputError

CPU = capabilities("cpu", torch.float32)
WAN = (Role("self", grid=True), Role("cross", key_bias=True))


def qkv(grid: tuple[int, int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, math.prod(grid), 3, 8, generator=generator) for _ in range(3)]


def test_named_for_all_it_serves_the_grid_alone() -> None:
    table = resolve_attention("vsa:sparsity=0.5", CPU, WAN)
    assert table.choices["self"].backend == "vsa:sparsity=0.5"
    assert "lossy" in table.choices["self"].reason
    assert table.choices["cross"].backend == CPU.preferred
    assert "grid" in table.choices["cross"].reason
    assert resolve_attention("self=sta:window=3,3,3,tile=2,4,4;cross=math", CPU, WAN).choices["cross"].backend == "math"


def test_auto_is_never_lossy() -> None:
    for device in ("cpu", "cuda"):
        for dtype in (torch.float32, torch.bfloat16):
            served = capabilities(device, dtype)
            assert all(c.sparse is None for c in resolve_attention("auto", served, WAN).choices.values())
            assert served.preferred in ("sdpa", "chunked")


@pytest.mark.parametrize("request_", ["cross=vsa", {"cross": "sta"}])
def test_roles_without_a_grid_refuse(request_: Any) -> None:
    with pytest.raises(CompositionError, match=r"'cross'.*grid"):
        resolve_attention(request_, CPU, WAN)


def test_models_without_a_grid_refuse() -> None:
    with pytest.raises(CompositionError, match=r"'sta'.*this model has none"):
        resolve_attention("sta", CPU, (Role("self"), Role("cross")))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("sta:window=3,3", "3 whole numbers"),
        ("sta:window=0,1,1", "at least 1"),
        ("sta:window=a,b,c", "3 whole numbers"),
        ("sta:sparsity=0.5", "unknown parameters"),
        ("sta:ramp=2", "unknown parameters"),
        ("vsa:sparsity=1.5", r"\[0, 1\]"),
        ("vsa:sparsity=nan", r"\[0, 1\]"),
        ("vsa:sparsity", "NAME=VALUE"),
        ("vsa:3,sparsity=0.5", "NAME=VALUE"),
        ("vsa:sparsity=0.5,sparsity=0.6", "once"),
        ("vsa:kernel=magic", "blocks, flex, triton, reference"),
        ("vmoba:kernel=triton", "blocks, reference"),
        ("vmoba:threshold=0.2,sparsity=0.5", "exclude each other"),
        ("vmoba:sparsity=0.5,scope=head", "scope belongs to threshold"),
        ("vmoba:ramp=2", "ramp belongs to sparsity"),
        ("sla:query_block=0", "at least 1"),
        ("vsa:dense_steps=1.5", "whole number of steps"),
        ("vsa:dense_steps=-1", r"\[0, "),
        ("vsa:dense_layers=1.5", "whole number"),
    ],
)
def test_wrong_settings(spec: str, says: str) -> None:
    for request in (spec, {"self": spec}):
        with pytest.raises(ConfigError, match=says):
            resolve_attention(request, CPU, WAN)


@pytest.mark.parametrize("kernel", ["flex", "triton"])
def test_kernels_of_other_devices_refuse(kernel: str) -> None:
    with pytest.raises(CompositionError, match=f"kernel={kernel} is for CUDA"):
        resolve_attention(f"vsa:kernel={kernel}", CPU, WAN)


@pytest.mark.skipif(find_spec("triton") is not None, reason="Triton is installed")
def test_triton_says_what_to_install() -> None:
    with pytest.raises(CompositionError, match="pip install triton"):
        resolve_attention("vsa:kernel=triton", capabilities("cuda", torch.float32), WAN)


def test_layers_tell_their_grid() -> None:
    """With a grid the call is sparse, without one dense; gates are made only for a kind that has them."""
    grid = (2, 4, 4)
    q, k, v = qkv(grid)
    made: list[str] = []

    def gate() -> Tensor:
        made.append("gate")
        return torch.ones_like(q)

    for spec in ("sta:window=1,1,1,tile=2,2,2", "vsa:sparsity=0.5,tile=2,2,2"):
        table = resolve_attention(spec, CPU, WAN)
        with forward_context(ForwardContext(table)):
            sparse = attention(q, k, v, role="self", grid=grid, gate=gate)
            dense = attention(q, k, v, role="self")
        trained = Trained(torch.ones_like(q)) if spec.startswith("vsa") else Trained()
        assert torch.equal(sparse, make_sparse(spec).over_grid(q, k, v, grid=grid, trained=trained))
        assert torch.equal(dense, default_attention(q, k, v))
    assert torch.equal(attention(q, k, v, role="self", grid=grid, gate=gate), dense)  # outside a context
    assert made == ["gate"]


def test_fewer_tokens_than_the_grid() -> None:
    with pytest.raises(InputError, match="grid"):
        make_sparse("vsa").over_grid(*qkv((1, 2, 3)), grid=(2, 2, 3))
