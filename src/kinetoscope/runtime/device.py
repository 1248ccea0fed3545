"""Devices and number formats by name."""

from __future__ import annotations

import torch

from kinetoscope.core.errors import ConfigError
from kinetoscope.core.spec import unknown

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device of a name; "auto" is CUDA if there is one, else the CPU.

    A backend from outside torch that has registered its device (torch's PrivateUse1, such as "npu:0") is accepted.

    Raises:
        ConfigError: no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {device!r}; use auto, cpu, cuda or cuda:N") from error
    if found.type not in ("cpu", "cuda", _registered()):
        raise ConfigError(f"device {device!r} is not supported; use auto, cpu, cuda or cuda:N")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r} was asked for, but torch sees no CUDA device here; use cpu")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {device!r}: this machine has {torch.cuda.device_count()} CUDA devices, from cuda:0")
    return found


def _registered() -> str | None:
    """Return the type of the device that a backend from outside torch has registered here, or None."""
    name: str = torch._C._get_privateuse1_backend_name()  # pyright: ignore
    return name if hasattr(torch, name) else None


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype for a name; "auto" is bfloat16 on CUDA and float32 on the CPU.

    Raises:
        ConfigError: an unknown name, or a dtype that is not one of `DTYPES`.
    """
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ConfigError(unknown("dtype", dtype, ["auto", *DTYPES]))
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """Its name without `torch.`."""
    return str(dtype).removeprefix("torch.")
