"""What this machine offers: devices, number formats, threads, software, and which attention serves where and why."""

from __future__ import annotations

from typing import Any

import torch

from kinetoscope.attention import BACKENDS, SPARSE, Capabilities, Role, capabilities, resolve_attention
from kinetoscope.core.config import settings
from kinetoscope.core.cpu import CpuLevel, cpu_level, has_bfloat16_kernels
from kinetoscope.core.errors import KinetoscopeError
from kinetoscope.core.extensions import failed_extensions, load_extensions
from kinetoscope.runtime.device import dtype_name, resolve_device, resolve_dtype
from kinetoscope.runtime.record import versions

ROLES = (Role("self", grid=True), Role("cross", key_bias=True))


def slow_dtypes(device: torch.device) -> dict[str, str]:
    """Return number formats that work on a device but should not be used there, and why."""
    if device.type != "cpu":
        return {}
    if not has_bfloat16_kernels():
        return {"bfloat16": "this processor has no instructions for it; matrix products were 400 times slower (AVX2)"}
    if cpu_level() == CpuLevel.AVX512:
        return {"bfloat16": "this processor converts it to float32; matrix products were 2.4 times slower"}
    return {}


def attention_backends(served: Capabilities) -> dict[str, dict[str, str]]:
    """Every backend and sparse kind by name.

    Returns:
        name -> {"serves": "yes", "without key bias" or "no"; "exactness": "exact" or "lossy"; "why": what it cannot
        do and what to install, or what it approximates}.
    """
    found: dict[str, dict[str, str]] = {}
    for name, backend in BACKENDS.items():
        refused, unbiased = served.refused.get(name), served.without_bias.get(name)
        found[name] = {
            "serves": "no" if refused else "without key bias" if unbiased else "yes",
            "exactness": "lossy" if backend.lossy else "exact",
            "why": "; ".join(filter(None, (refused or unbiased, backend.lossy))),
        }
    for name, kind in SPARSE.items():
        found[name] = {"serves": "yes", "exactness": "lossy", "why": f"video tokens only; {kind.lossy}"}
    return found


def refusal(attention: str, served: Capabilities) -> str | None:
    """Return why a setting of the attention cannot serve on a device; None if it can."""
    try:
        resolve_attention(attention, served, ROLES)
    except KinetoscopeError as error:
        return str(error)
    return None


def examine(device: str = "auto") -> dict[str, Any]:
    """Facts for `kinetoscope doctor`, fit for JSON.

    Returns:
        versions, extensions (and why some could not be imported), devices, threads, the default device and dtype, and
        for each dtype the attention table: role -> {backend, reason}, what `KINETOSCOPE_ATTENTION` names and why that
        cannot serve, the backends that cannot serve and why, and all backends and sparse kinds (`attention_backends`).

    Raises:
        ConfigError: no such device.
    """
    place = resolve_device(device)
    tables: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        served = capabilities(place.type, dtype)
        choices = resolve_attention("auto", served, ROLES).choices
        asked = settings().attention
        tables[dtype_name(dtype)] = {
            "setting": {"attention": asked, "refused": refusal(asked, served)},
            "roles": {role: {"backend": c.backend, "reason": c.reason} for role, c in choices.items()},
            "refused": dict(served.refused),
            "backends": attention_backends(served),
        }
    return {
        "versions": versions(),
        "extensions": {e.module: e.version for e in load_extensions()},
        "failed_extensions": failed_extensions(),
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cpu": cpu_level().name,
        "threads": torch.get_num_threads(),
        "device": str(place),
        "dtype": dtype_name(resolve_dtype("auto", place)),
        "slow_dtypes": slow_dtypes(place),
        "attention": tables,
    }
