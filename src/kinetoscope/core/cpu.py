"""The vector instructions of this CPU: the one value by which kernels are chosen.

Everything that chooses between kernels of a CPU asks `cpu_level`. Tests set the value with `override_cpu_level`, so
that every choice is tested on any CPU. The kernels of a lower level run on a higher one by the libraries' own switches
(`LIBRARY_SWITCHES`), which the detected level follows.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from types import MappingProxyType

import torch

from kinetoscope.core.config import onednn_limit


class CpuLevel(IntEnum):
    """Vector instructions that torch and oneDNN use; a level includes those before it.

    Attributes:
        BASE: those of any x86-64 processor, or of another architecture, for which nothing is measured.
        AVX2: vectors of 256 bits; bfloat16 products are emulated, 400 times slower.
        AVX512: vectors of 512 bits; bfloat16 products are float32 products after a conversion.
        AVX512_BF16: dot products of bfloat16.
        AMX: tiles of bfloat16.
    """

    BASE = 0
    AVX2 = 1
    AVX512 = 2
    AVX512_BF16 = 3
    AMX = 4


LIBRARY_SWITCHES: Mapping[CpuLevel, Mapping[str, str]] = MappingProxyType(
    {
        level: MappingProxyType(
            dict(zip(("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"), values, strict=True))
        )
        for level, values in {
            CpuLevel.BASE: ("default", "SSE41", "SSE4_2"),
            CpuLevel.AVX2: ("avx2", "AVX2", "AVX2"),
            CpuLevel.AVX512: ("avx512", "AVX512_CORE", "AVX512"),
            CpuLevel.AVX512_BF16: ("avx512", "AVX512_CORE_BF16", "AVX512"),
            CpuLevel.AMX: ("avx512", "AVX512_CORE_AMX", "AVX512"),
        }.items()
    }
)
"""Environment variables that lower torch, oneDNN and MKL to a level; they count when set before torch is loaded. None
of them raises a CPU above what it has."""

ONEDNN_BFLOAT16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""Whether oneDNN multiplies matrices of bfloat16 in this process: on x86 from AVX512 on."""

_WITHOUT_BF16 = {"AVX512_CORE", "AVX512_CORE_VNNI"}
_WITHOUT_AMX = _WITHOUT_BF16 | {"AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512", "AVX10_2_512"}


def detect_cpu_level() -> CpuLevel:
    """Return the level of this process: of the processor, lowered as `LIBRARY_SWITCHES` say."""
    capability, limit = torch.backends.cpu.get_cpu_capability(), onednn_limit()
    if not capability.startswith("AVX"):
        return CpuLevel.BASE
    if not capability.startswith("AVX512") or not ONEDNN_BFLOAT16:
        return CpuLevel.AVX2
    if torch.cpu._is_amx_tile_supported() and limit not in _WITHOUT_AMX:  # pyright: ignore[reportPrivateUsage]
        return CpuLevel.AMX
    if torch.cpu._is_avx512_bf16_supported() and limit not in _WITHOUT_BF16:  # pyright: ignore[reportPrivateUsage]
        return CpuLevel.AVX512_BF16
    return CpuLevel.AVX512


_level = detect_cpu_level()  # now, since a compiled region cannot ask


def cpu_level() -> CpuLevel:
    """Return the level by which kernels are chosen; compiled regions trace it."""
    return _level


def has_bfloat16_kernels() -> bool:
    """Return whether oneDNN has kernels for products of bfloat16 at this level."""
    level = cpu_level()
    return level >= CpuLevel.AVX512 or (level == CpuLevel.BASE and ONEDNN_BFLOAT16)


def has_exact_int8_products() -> bool:
    """Return whether `torch._int_mm`, which multiplies matrices of int8, gives the right sums on the CPU.

    torch chooses oneDNN's product where the processor has VNNI instructions. oneDNN that an environment variable holds
    below them adds pairs of products in 16 bits, where large ones saturate. The products that saturate most are
    computed here, since torch tells neither its choice nor oneDNN's.
    """
    largest = torch.full((16, 64), 127, dtype=torch.int8)
    found = torch._int_mm(largest, largest.t())  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    return bool((found == 64 * 127**2).all())


@contextmanager
def override_cpu_level(level: CpuLevel) -> Generator[None, None, None]:
    """Choose kernels in this process as a CPU of another level does, for tests.

    Only the choice changes: the kernels are those of this CPU. A kernel that it lacks is not chosen at a higher level.
    """
    global _level
    before, _level = _level, level
    try:
        yield
    finally:
        _level = before
