"""What this machine offers: devices, number formats, threads, software, and which attention serves where and why."""

from __future__ import annotations

from typing import Any

import torch

from kinetoscope.attention import capabilities, resolve_attention
from kinetoscope.runtime.device import dtype_name, resolve_device, resolve_dtype
from kinetoscope.runtime.record import versions

ROLES = ("self", "cross")


def slow_dtypes(device: torch.device) -> dict[str, str]:
    """Number formats that work on a device but should not be used there, and why."""
    fast = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if device.type == "cpu" and not fast:
        return {"bfloat16": "this processor has no instructions for it; matrix products were 400 times slower (AVX2)"}
    return {}


def examine(device: str = "auto") -> dict[str, Any]:
    """Facts for `kinetoscope doctor`, fit for JSON.

    Returns:
        versions, devices, threads, the default device and dtype, and for each dtype the attention table: role ->
        {backend, reason}, with the backends that cannot serve and why.

    Raises:
        ConfigError: no such device.
    """
    place = resolve_device(device)
    tables: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        served = capabilities(place.type, dtype)
        choices = resolve_attention("auto", served, ROLES).choices
        tables[dtype_name(dtype)] = {
            "roles": {role: {"backend": c.backend, "reason": c.reason} for role, c in choices.items()},
            "refused": dict(served.refused),
        }
    return {
        "versions": versions(),
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": str(place),
        "dtype": dtype_name(resolve_dtype("auto", place)),
        "slow_dtypes": slow_dtypes(place),
        "attention": tables,
    }
