"""The backend that serves where nobody named one."""

from __future__ import annotations

import torch
from torch import Tensor

from kinetoscope.attention.backends import chunked_attention, sdpa_attention

AVX512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")  # asked here, since a compiled region cannot ask
AMX = torch.cpu._is_amx_tile_supported()  # pyright: ignore[reportPrivateUsage]

GRADIENT_KEYS = 512
"""Keys up to which plain products in bfloat16, with their gradients, take .1 to .9 of the time of SDPA on a CPU with
AMX (of 24 rows of 144 queries; 1.1 at most for other shapes), of which SDPA's backward is nearly all."""


def preferred_backend(device: str, dtype: torch.dtype) -> tuple[str, str]:
    """The backend that "auto" takes on a device type in a dtype, and why; compiled regions trace it."""
    if device != "cpu":
        return "sdpa", "torch picks a fused kernel of the device"
    if not AVX512:
        return "sdpa", "without AVX512 it was 1.5 times as fast as chunked"
    if AMX:
        return "sdpa", "with AMX it was 1.2 to 4.6 times as fast as chunked"
    if dtype in (torch.bfloat16, torch.float32):
        return "chunked", "its matmuls use faster CPU kernels than sdpa's own"
    return "sdpa", "the CPU's fast matmuls have no kernel for this dtype"


def default_attention(q: Tensor, k: Tensor, v: Tensor, *, key_bias: Tensor | None = None) -> Tensor:
    """Dense attention by the preferred backend, or by one whose gradients are fast; see `backends.math_attention`."""
    chunked = preferred_backend(q.device.type, q.dtype)[0] == "chunked" or _trains_faster_chunked(q, k)
    return (chunked_attention if chunked else sdpa_attention)(q, k, v, key_bias=key_bias)


def _trains_faster_chunked(q: Tensor, k: Tensor) -> bool:
    trained = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    return trained and AMX and q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[1] <= GRADIENT_KEYS
