"""Values of the host on a device, without a wait for the device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Return `x` on `device`, in `dtype` where one is given.

    A tensor of the host goes through pinned memory: the host does not wait until the device has finished its work.

    Args:
        x: tensor of any device.
        device: where the result is.
        dtype: of the result; None: that of `x`.
    """
    device, dtype = torch.device(device), x.dtype if dtype is None else dtype
    if x.device.type == device.type or x.device.type != "cpu":
        return x.to(device, dtype)
    return x.pin_memory().to(device, non_blocking=True).to(dtype)


class HostRead:
    """A value of a device on its way to the host, which goes on meanwhile.

    Args:
        x: a tensor of any device.

    Attributes:
        value: the tensor on the host; it may be read once `ready` is true.
    """

    def __init__(self, x: Tensor) -> None:
        self.value = x.to("cpu", non_blocking=True)
        self._event = None if x.device.type == "cpu" else torch.Event(x.device)
        if self._event is not None:
            self._event.record()

    @property
    def ready(self) -> bool:
        """Whether the value has arrived."""
        return self._event is None or self._event.query()


@lru_cache(maxsize=256)
def _constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return to_device(torch.tensor(values, dtype=dtype), device)


def device_constant(values: Sequence[float], device: torch.device | str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the 1-D tensor of `values` on `device`: made once a process, so do not write into it."""
    return _constant(tuple(values), torch.device(device), dtype)


def as_floats(values: Tensor) -> list[float]:
    """Return a 1-D tensor as Python numbers, which the host reads from the device at once."""
    read = cast("list[float]", values.tolist())  # pyright: ignore[reportUnknownMemberType]
    return [float(v) for v in read]
