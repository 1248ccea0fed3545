"""The backend that serves where nobody named one."""

from __future__ import annotations

import torch
from torch import Tensor

from kinetoscope.attention.backends import sdpa_attention
from kinetoscope.attention.chunked import chunked_attention
from kinetoscope.core.cpu import CpuLevel, cpu_level

GRADIENT_KEYS = 512
"""Keys up to which plain products in bfloat16, with their gradients, take .1 to .9 of the time of SDPA on a CPU with
AMX (of 24 rows of 144 queries; 1.1 at most for other shapes), of which SDPA's backward is nearly all. With AVX512 and
no products of bfloat16 they take .2 to .6 (1.1 at most)."""


def preferred_backend(device: str, dtype: torch.dtype) -> tuple[str, str]:
    """Return the backend that "auto" takes on a device type in a dtype, and why; compiled regions trace it."""
    if device != "cpu":
        return "sdpa", "torch picks a fused kernel of the device"
    level = cpu_level()
    if level == CpuLevel.AMX:
        return "sdpa", "with AMX it was 1.2 to 4.6 times as fast as chunked"
    if level < CpuLevel.AVX512:
        return "sdpa", "without AVX512 it was 1.5 times as fast as chunked"
    if level < CpuLevel.AVX512_BF16:
        return "sdpa", "without products of bfloat16 it was 1.1 to 2.6 times as fast as chunked"
    if dtype in (torch.bfloat16, torch.float32):
        return "chunked", "its matmuls use faster CPU kernels than sdpa's own"
    return "sdpa", "the CPU's fast matmuls have no kernel for this dtype"


def default_attention(q: Tensor, k: Tensor, v: Tensor, *, key_bias: Tensor | None = None) -> Tensor:
    """Compute attention by the preferred backend, or by one with fast gradients; see `backends.math_attention`."""
    chunked = preferred_backend(q.device.type, q.dtype)[0] == "chunked" or _trains_faster_chunked(q, k)
    return (chunked_attention if chunked else sdpa_attention)(q, k, v, key_bias=key_bias)


def _trains_faster_chunked(q: Tensor, k: Tensor) -> bool:
    """Return whether plain products are the faster ones with gradients where SDPA is without.

    A compiled region has two graphs at most by it, one for each answer.
    """
    trained = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    few = q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[1] <= GRADIENT_KEYS
    return trained and few and cpu_level() in (CpuLevel.AVX512, CpuLevel.AMX)
