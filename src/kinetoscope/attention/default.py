"""The backend that serves where nobody named one."""

from __future__ import annotations

import torch
from torch import Tensor

from kinetoscope.attention.backends import chunked_attention, sdpa_attention

AVX512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")  # asked here, since a compiled region cannot ask
AMX = torch.cpu._is_amx_tile_supported()  # pyright: ignore[reportPrivateUsage]


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
    """Dense attention by the preferred backend; see `backends.math_attention`."""
    chunked = preferred_backend(q.device.type, q.dtype)[0] == "chunked"
    return (chunked_attention if chunked else sdpa_attention)(q, k, v, key_bias=key_bias)
