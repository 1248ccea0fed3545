"""Attention as each kind of CPU chooses it, on any CPU: the choice, its graphs, its gradients, and its edge cases."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from kinetoscope.attention import BACKENDS, capabilities, chunked, default, resolve_attention
from kinetoscope.attention.backends import math_attention
from kinetoscope.attention.chunked import chunked_attention
from kinetoscope.core.cpu import CpuLevel, has_bfloat16_kernels, override_cpu_level

LENGTHS = (5, 40, 12)
"""Of text. The second makes more chunks than the first where a chunk holds few scores."""


def draw(rows: int, n: int, m: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, length, 3, 16, generator=generator).to(dtype) for length in (n, m, m)]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let few tokens be several chunks, of queries and of heads."""
    monkeypatch.setattr(chunked, "CHUNK", 4)
    monkeypatch.setattr(chunked, "SCORES", 40)


@pytest.mark.parametrize(
    ("level", "device", "dtype", "expected"),
    [
        (CpuLevel.BASE, "cpu", torch.float32, "sdpa"),
        (CpuLevel.AVX2, "cpu", torch.float32, "sdpa"),
        (CpuLevel.AVX2, "cuda", torch.bfloat16, "sdpa"),
        (CpuLevel.AVX512, "cpu", torch.float32, "sdpa"),
        (CpuLevel.AVX512, "cpu", torch.bfloat16, "sdpa"),
        (CpuLevel.AVX512_BF16, "cpu", torch.float32, "chunked"),
        (CpuLevel.AVX512_BF16, "cpu", torch.bfloat16, "chunked"),
        (CpuLevel.AVX512_BF16, "cpu", torch.float16, "sdpa"),
        (CpuLevel.AVX512_BF16, "cuda", torch.bfloat16, "sdpa"),
        (CpuLevel.AMX, "cpu", torch.float32, "sdpa"),
        (CpuLevel.AMX, "cpu", torch.bfloat16, "sdpa"),
    ],
)
def test_preferred_backend_follows_the_level(level: CpuLevel, device: str, dtype: torch.dtype, expected: str) -> None:
    with override_cpu_level(level):
        table = resolve_attention("auto", capabilities(device, dtype), ["self"])
    assert table.choices["self"].backend == expected


@pytest.mark.parametrize("level", CpuLevel)
def test_gradients_of_few_keys_in_bfloat16_are_chunked(monkeypatch: pytest.MonkeyPatch, level: CpuLevel) -> None:
    """They alone are by plain products where SDPA is the faster one without gradients."""
    seen: list[str] = []
    for name in ("chunked", "sdpa"):
        named = BACKENDS[name].function
        spy = partial(lambda name, f, *x, **told: (seen.append(name), f(*x, **told))[1], name, named)
        monkeypatch.setattr(default, f"{name}_attention", spy)
    monkeypatch.setattr(default, "GRADIENT_KEYS", 8)
    with override_cpu_level(level):
        for dtype in (torch.bfloat16, torch.float32):
            for keys in (8, 9):
                q, k, v = (x.requires_grad_() for x in draw(2, 7, keys, dtype))
                out = default.default_attention(q, k, v)
                with torch.no_grad():
                    torch.testing.assert_close(default.default_attention(q, k, v), out, rtol=0, atol=3e-2)
    preferred = "chunked" if level == CpuLevel.AVX512_BF16 else "sdpa"
    few = "chunked" if level in (CpuLevel.AVX512, CpuLevel.AMX) else preferred
    assert seen[::2] == [few, preferred, preferred, preferred] and set(seen[1::2]) == {preferred}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("level", CpuLevel)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [False, True])
def test_compiled_attention_makes_one_graph_for_all_lengths_of_text(
    level: CpuLevel, dtype: torch.dtype, trained: bool
) -> None:
    """With values and gradients of the formula; the lengths make different numbers of chunks."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    attend = torch.compile(default.default_attention, backend=graphs)
    with override_cpu_level(level), torch.set_grad_enabled(trained):
        for length in LENGTHS:
            inputs = [x.requires_grad_(trained) for x in draw(2, 7, length, dtype)]
            bias = torch.zeros(2, length)
            bias[1, -1] = 2.0
            for x in (*inputs[1:], bias):
                torch._dynamo.maybe_mark_dynamic(x, 1)
            out = attend(*inputs, key_bias=bias)
            exact = [x.detach().float().requires_grad_(trained) for x in inputs]
            expected = math_attention(*exact, key_bias=bias)
            coarse = dtype == torch.bfloat16
            torch.testing.assert_close(out.float(), expected, rtol=0, atol=3e-2 if coarse else 2e-6)
            if trained:
                got = torch.autograd.grad(out.float().square().sum(), inputs)
                for a, b in zip(got, torch.autograd.grad(expected.square().sum(), exact), strict=True):
                    torch.testing.assert_close(
                        a.float(), b, rtol=3e-2 if coarse else 1e-4, atol=6e-2 if coarse else 1e-5
                    )
    assert graphs.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("with_bias", [False, True])
def test_compiled_chunks_have_the_gradients_of_plain_ones(with_bias: bool) -> None:
    """All gradients, of the key bias too."""
    torch._dynamo.reset()
    inputs = [x.requires_grad_() for x in draw(2, 11, 9)]
    bias = torch.linspace(-1, 1, 18).view(2, 9).requires_grad_() if with_bias else None
    wanted = inputs if bias is None else [*inputs, bias]
    found: list[tuple[Tensor, ...]] = []
    for attend in (chunked_attention, torch.compile(chunked_attention, backend="aot_eager", fullgraph=True)):
        out = attend(*inputs, key_bias=bias)
        found.append((out, *torch.autograd.grad(out.square().sum(), wanted)))
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize("compile", [False, True])
def test_chunks_follow_autocast_as_sdpa_does(compile: bool) -> None:
    torch._dynamo.reset()
    inputs = [x.requires_grad_() for x in draw(2, 300, 9)]
    found: list[list[Tensor]] = []
    for attend in (BACKENDS["sdpa"].function, chunked_attention):
        run = torch.compile(attend, backend="aot_eager") if compile else attend
        with torch.autocast("cpu", torch.bfloat16):
            out = run(*inputs)
        assert out.dtype == torch.bfloat16
        found.append([out, *torch.autograd.grad(out.float().sum(), inputs)])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(run(*inputs), out, rtol=0, atol=2e-2)
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=3e-2, atol=3e-2)
    torch._dynamo.reset()


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("sizes", [(2, 0, 5), (2, 5, 0), (2, 0, 0), (0, 5, 5)])
@pytest.mark.parametrize("name", [n for n in BACKENDS if n not in capabilities("cpu", torch.float32).refused])
def test_attention_without_tokens_is_empty_or_zero(name: str, sizes: tuple[int, int, int], compile: bool) -> None:
    """With gradients and without: a process may hold no tokens of a short sequence."""
    torch._dynamo.reset()
    function = BACKENDS[name].function
    attend = torch.compile(function, backend="aot_eager") if compile else function
    inputs = [x.requires_grad_() for x in draw(*sizes)]
    for bias in (None, torch.zeros(sizes[0], sizes[2])):
        out = attend(*inputs, key_bias=bias)
        assert torch.equal(out, torch.zeros_like(inputs[0]))
        for grad in torch.autograd.grad(out.sum(), inputs):
            assert not grad.any()
        with torch.no_grad():
            assert torch.equal(attend(*inputs, key_bias=bias), torch.zeros_like(inputs[0]))
    torch._dynamo.reset()


@pytest.mark.parametrize("level", CpuLevel)
def test_bfloat16_kernels_are_those_from_avx512_on(level: CpuLevel) -> None:
    with override_cpu_level(level):
        if level != CpuLevel.BASE:  # there by the architecture
            assert has_bfloat16_kernels() is (level >= CpuLevel.AVX512)
