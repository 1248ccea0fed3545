"""Optional packages through stand-ins with the packages' own signatures: order of arguments, layout, refusals."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from kinetoscope.attention import Role, capabilities, resolve_attention
from kinetoscope.attention.backends import math_attention
from kinetoscope.attention.external import EXTERNAL, FLASH2, FLASH3, FLASH4, SAGE2, SAGE3, ExternalBackend
from kinetoscope.core.errors import CompositionError

ROLES = (Role("self", grid=True), Role("cross", key_bias=True))


def scaled(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    assert scale is None
    return math_attention(q, k, v)


def flash2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    assert not dropout_p and not causal and q.shape[2] == k.shape[2]  # [batch, tokens, heads, channels]
    return scaled(q, k, v, softmax_scale)


def flash3(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False, qv: Any = None
) -> Tensor:
    assert not causal and qv is None and q.shape[2] == k.shape[2]
    return scaled(q, k, v, softmax_scale)


def flash3_older(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    return flash3(q, k, v, softmax_scale, causal), torch.zeros(q.shape[0], q.shape[2], q.shape[1])


def flash4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
) -> tuple[Tensor, None]:
    return flash3(q, k, v, softmax_scale, causal), None


def sage2(
    q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", is_causal: bool = False, sm_scale: Any = None,
    return_lse: bool = False, **kwargs: Any,
) -> Tensor:  # fmt: skip
    assert not is_causal and not return_lse and not kwargs
    if tensor_layout == "HND":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    assert q.shape[2] == k.shape[2]
    out = scaled(q, k, v, sm_scale)
    return out.transpose(1, 2) if tensor_layout == "HND" else out


def sage3(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, is_causal: bool = False, per_block_mean: bool = True
) -> Tensor:
    assert attn_mask is None and not is_causal and q.shape[1] == k.shape[1]  # [batch, heads, tokens, channels]
    assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
    out = math_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    k -= k.mean(2, keepdim=True)  # as the package does; it changes no weight, but a caller's tensor
    return out


STANDINS: list[tuple[ExternalBackend, Callable[..., Any]]] = [
    (FLASH2, flash2), (FLASH3, flash3), (FLASH3, flash3_older), (FLASH4, flash4), (SAGE2, sage2), (SAGE3, sage3)
]  # fmt: skip


def install(monkeypatch: pytest.MonkeyPatch, backend: ExternalBackend, function: Callable[..., Any] | None) -> None:
    """A stand-in for a backend's package."""
    parts = backend.module.split(".")
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    if function is not None:
        monkeypatch.setattr(sys.modules[backend.module], backend.function, function, raising=False)


@pytest.fixture(autouse=True)
def blackwell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the device be a Blackwell one, which all backends but FlashAttention 3 serve."""
    monkeypatch.setattr("kinetoscope.attention.external.compute_capability", lambda: (10, 0))


def qkv(channels: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, n, 3, channels, generator=generator) for n in (7, 5, 5)]


@pytest.mark.parametrize(("backend", "function"), STANDINS)
def test_arguments_and_layout(
    backend: ExternalBackend, function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, backend, function)
    q, k, v = qkv()
    before = k.clone()
    torch.testing.assert_close(backend(q, k, v), math_attention(q, k, v), rtol=0, atol=1e-6)
    assert torch.equal(k, before)


@pytest.mark.parametrize(("backend", "function"), STANDINS)
def test_served_where_installed(
    backend: ExternalBackend, function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kinetoscope.attention.external.compute_capability", lambda: (backend.majors[0], 0))
    install(monkeypatch, backend, function)
    choice = resolve_attention({"self": backend.name}, capabilities("cuda", torch.bfloat16), ROLES).choices["self"]
    assert choice.backend == backend.name
    assert ("lossy" in choice.reason) == backend.name.startswith("sage")


@pytest.mark.parametrize("backend", EXTERNAL, ids=lambda b: b.name)
def test_refused_for_keys_with_a_bias(backend: ExternalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kinetoscope.attention.external.compute_capability", lambda: None)
    install(monkeypatch, backend, math_attention)
    with pytest.raises(CompositionError, match=rf"'{backend.name}' cannot serve 'cross'.*self={backend.name}"):
        resolve_attention(backend.name, capabilities("cuda", torch.float16), ROLES)
    with pytest.raises(CompositionError, match="key bias"):  # and never dropped, however it got there
        backend(*qkv(), key_bias=torch.zeros(2, 5))


@pytest.mark.parametrize("backend", EXTERNAL, ids=lambda b: b.name)
def test_refused_where_it_cannot_run(backend: ExternalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(device: str, dtype: torch.dtype) -> str:
        with pytest.raises(CompositionError, match=f"'{backend.name}' for 'self'") as error:
            resolve_attention({"self": backend.name}, capabilities(device, dtype), ROLES)
        return str(error.value)

    assert "CUDA only" in refusal("cpu", torch.bfloat16)
    assert "float16 or bfloat16" in refusal("cuda", torch.float32)
    monkeypatch.setattr("kinetoscope.attention.external.compute_capability", lambda: (7, 5))
    assert "compute capability 7.5" in refusal("cuda", torch.bfloat16)
    monkeypatch.setattr("kinetoscope.attention.external.compute_capability", lambda: None)
    absent = refusal("cuda", torch.bfloat16)
    assert "not installed" in absent and backend.install in absent


def test_a_package_that_does_not_import_is_told_when_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FLASH2, None)  # installed, but without the function: another build of the library
    with pytest.raises(CompositionError, match=r"flash_attn\.flash_attn_func cannot be imported.*pip install"):
        resolve_attention({"self": "flash2"}, capabilities("cuda", torch.bfloat16), ROLES)


def test_heads_and_gradients_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, SAGE3, sage3)
    with pytest.raises(CompositionError, match="96 channels"):
        SAGE3(*qkv(96))
    with pytest.raises(CompositionError, match="no gradient"):
        SAGE3(*(x.requires_grad_() for x in qkv()))
