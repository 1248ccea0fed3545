"""Backends against the plain formula, and the choice between them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kinetoscope.attention import (
    BACKENDS,
    Role,
    attention,
    capabilities,
    dispatch,
    register_backend,
    resolve_attention,
)
from kinetoscope.attention.backends import math_attention
from kinetoscope.attention.chunked import CHUNK
from kinetoscope.attention.flex import flex_dense_attention
from kinetoscope.core.context import ForwardContext, forward_context
from kinetoscope.core.errors import CompositionError, ConfigError
from kinetoscope.nn.block_causal import teacher_forcing_rows

CPU = capabilities("cpu", torch.float32)
FAST = [name for name in BACKENDS if name != "math" and name not in CPU.refused]
WAN = (Role("self", grid=True), Role("cross", key_bias=True))


def qkv(rows: int, n: int, m: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, length, 3, 16, generator=generator).to(dtype) for length in (n, m, m)]


def bias(rows: int, m: int) -> Tensor:
    """A weight of 500 for the last key, the one before it hidden in the last row."""
    made = torch.zeros(rows, m)
    made[:, -1] = math.log(500)
    made[-1, -2] = -math.inf
    return made


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("sizes", [(2, 7, 5), (1, CHUNK + 3, 9), (2, 300, 300), (1, 1, 2), (1, CHUNK + 1, 3000)])
def test_backend_equals_formula(name: str, with_bias: bool, sizes: tuple[int, int, int]) -> None:
    rows, n, m = sizes
    q, k, v = qkv(rows, n, m)
    key_bias = bias(rows, m) if with_bias else None
    with torch.no_grad():
        expected = math_attention(q, k, v, key_bias=key_bias)
        got = BACKENDS[name].function(q, k, v, key_bias=key_bias)
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)
        low = [x.bfloat16() for x in (q, k, v)]
        coarse = BACKENDS[name].function(*low, key_bias=key_bias)
        assert coarse.dtype == torch.bfloat16
        torch.testing.assert_close(coarse.float(), expected, rtol=0, atol=3e-2)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("n", [7, CHUNK + 3])
def test_backend_gradients(name: str, n: int) -> None:
    inputs = [x.requires_grad_() for x in qkv(2, n, 6)]
    expected = torch.autograd.grad(math_attention(*inputs, key_bias=bias(2, 6)).square().sum(), inputs)
    got = torch.autograd.grad(BACKENDS[name].function(*inputs, key_bias=bias(2, 6)).square().sum(), inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("with_bias", [False, True])
def test_rows_of_short_and_of_long_sequences(monkeypatch: pytest.MonkeyPatch, with_bias: bool) -> None:
    """One masked product and a product a row are the formula, query by query, and have its gradients."""
    rows = teacher_forcing_rows((2, 1, 3), window=3, sink=1)
    inputs, key_bias = [x.requires_grad_() for x in qkv(2, 12, 12)], bias(2, 12) if with_bias else None
    expected = torch.cat(
        [math_attention(inputs[0][:, slice(*own)], *(torch.cat([x[:, slice(*s)] for s in seen], 1) for x in inputs[1:]),
                        key_bias=None if key_bias is None else torch.cat([key_bias[:, slice(*s)] for s in seen], 1))
         for own, seen in rows], dim=1)  # fmt: skip
    gradients = torch.autograd.grad(expected.square().sum(), inputs)
    found: list[Tensor] = []
    for short in (12 * 12, 12 * 12 - 1):
        monkeypatch.setattr(dispatch, "SHORT", short)
        found.append(attention(*inputs, role="self", rows=rows, key_bias=key_bias))
        torch.testing.assert_close(found[-1], expected, rtol=0, atol=2e-6)
        for a, b in zip(torch.autograd.grad(found[-1].square().sum(), inputs), gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not torch.equal(*found), "both ways were one"
    with forward_context(ForwardContext(attention={"self": math_attention})):
        assert torch.equal(attention(*inputs, role="self", rows=rows, key_bias=key_bias), expected), (
            "named, so not masked"
        )


def test_formula_by_hand() -> None:
    """Two keys, one with a bias of log 3, equal logits: weights 1/4 and 3/4."""
    q = torch.zeros(1, 1, 1, 4)
    v = torch.tensor([[0.0] * 4, [1.0] * 4]).view(1, 2, 1, 4)
    out = math_attention(q, torch.ones(1, 2, 1, 4), v, key_bias=torch.tensor([[0.0, math.log(3)]]))
    torch.testing.assert_close(out, torch.full((1, 1, 1, 4), 0.75))


def test_context_chooses() -> None:
    q, k, v = qkv(1, 4, 4)
    asked: list[str] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, *, key_bias: Tensor | None = None) -> Tensor:
        asked.append("spy")
        return math_attention(q, k, v, key_bias=key_bias)

    with forward_context(ForwardContext({"self": spy})):
        attention(q, k, v, role="self")
        attention(q, k, v, role="cross")  # not listed: the default
    attention(q, k, v, role="self")  # no context: the default
    assert asked == ["spy"]


def test_auto_gives_a_reason() -> None:
    table = resolve_attention("auto", CPU, ("self", "cross"))
    assert set(table) == {"self", "cross"}
    assert table["self"] is BACKENDS[CPU.preferred].function
    assert all(choice.reason.startswith("auto: ") for choice in table.choices.values())
    assert "self: " in str(table)


def test_named_backends() -> None:
    assert resolve_attention("math", CPU, ("self", "cross"))["cross"] is math_attention
    table = resolve_attention({"cross": "math"}, CPU, ("self", "cross"))
    assert table.choices["cross"].reason == "named by the user"
    assert table.choices["self"].backend == CPU.preferred


def test_a_named_backend_that_cannot_serve_is_an_error() -> None:
    with pytest.raises(CompositionError, match=r"'chunked'.*'self'.*cuda.*bfloat16"):
        resolve_attention("chunked", capabilities("cuda", torch.bfloat16), ("self",))


@pytest.mark.parametrize("request_", ["flash", {"self": "flash"}, {"sefl": "sdpa"}])
def test_unknown_names(request_: Any) -> None:
    with pytest.raises(ConfigError, match=r"unknown (backend|roles)"):
        resolve_attention(request_, CPU, ("self", "cross"))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a test registers is forgotten after it."""
    from kinetoscope.attention import table

    with monkeypatch.context() as patch:
        patch.setattr(table, "BACKENDS", dict(BACKENDS))
        yield


@pytest.mark.usefixtures("registry")
def test_registered_backends_are_named_and_refused() -> None:
    register_backend("mine", math_attention)
    register_backend("elsewhere", math_attention, lambda device, dtype: None if device == "cuda" else "it needs CUDA")
    here = capabilities("cpu", torch.float32)
    assert here.preferred == CPU.preferred
    assert resolve_attention("mine", here, ("self",))["self"] is math_attention
    assert resolve_attention("elsewhere", capabilities("cuda", torch.float32), ("self",))["self"] is math_attention
    with pytest.raises(CompositionError, match=r"'elsewhere'.*it needs CUDA"):
        resolve_attention("elsewhere", here, ("self",))


@pytest.mark.usefixtures("registry")
def test_a_registered_backend_without_bias_is_refused_where_one_may_come() -> None:
    register_backend("mine", math_attention, key_bias=False)
    here = capabilities("cpu", torch.float32)
    assert resolve_attention("self=mine", here, WAN).choices["self"].backend == "mine"
    with pytest.raises(CompositionError, match=r"'mine'.*'cross'.*key_bias=False.*self=mine"):
        resolve_attention("mine", here, WAN)


@pytest.mark.parametrize("name", ["auto", "math", "chunked", "flash2", "vsa"])
def test_builtin_backends_are_not_replaced(name: str) -> None:
    with pytest.raises(ConfigError, match="taken"):
        register_backend(name, math_attention)


@pytest.mark.parametrize("name", ["a:b", "a=b", "a;b", "a,b"])
def test_names_that_settings_could_not_tell_apart(name: str) -> None:
    with pytest.raises(ConfigError, match="may not hold"):
        register_backend(name, math_attention)


def test_roles_in_words() -> None:
    said = resolve_attention("self=math; cross=sdpa:math", CPU, WAN).choices
    assert (said["self"].backend, said["cross"].backend) == ("math", "sdpa:math")
    assert resolve_attention("cross=math", CPU, WAN).choices["self"].reason.startswith("auto")


@pytest.mark.parametrize("request_", ["self=math;self=sdpa", "self=", "=math", "self=math;sdpa", "sefl=math"])
def test_roles_in_wrong_words(request_: str) -> None:
    with pytest.raises(ConfigError):
        resolve_attention(request_, CPU, WAN)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("with_bias", [False, True])
def test_flex_equals_formula(with_bias: bool) -> None:
    """FlexAttention without a compiler: what it is asked to compute."""
    q, k, v = qkv(2, 9, 6)
    key_bias = bias(2, 6) if with_bias else None
    expected = math_attention(q, k, v, key_bias=key_bias)
    torch.testing.assert_close(flex_dense_attention(q, k, v, key_bias=key_bias), expected, rtol=0, atol=2e-6)


def test_what_a_cuda_device_refuses() -> None:
    single, half = capabilities("cuda", torch.float32), capabilities("cuda", torch.bfloat16)
    assert {"sdpa:flash", "sdpa:cudnn", "chunked"} <= set(single.refused)
    assert "sdpa:flash" not in half.refused and "flex" not in half.refused
    with pytest.raises(CompositionError, match=r"'sdpa:flash' cannot serve 'cross'.*no mask on CUDA.*self=sdpa:flash"):
        resolve_attention("sdpa:flash", half, WAN)
    assert resolve_attention("self=sdpa:flash", half, WAN).choices["self"].backend == "sdpa:flash"
    assert resolve_attention("sdpa:flash", capabilities("cpu", torch.float32), WAN)["cross"]  # there it takes masks
