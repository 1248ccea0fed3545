"""The changes (`core.lora`) that a loaded module carries, and how they come and go.

A weight of an ordinary dtype is changed in place, `W + sum(w * delta)` computed in float32 from a kept copy of W: the
forward costs what it did, compiled graphs stay, and W comes back bit for bit. A layer whose weight cannot be added to
(quantized, packed) gets its changes beside it, as a second, thin path.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from kinetoscope.core.errors import CompositionError
from kinetoscope.core.lora import Full, LowRank, Weighted
from kinetoscope.core.serial import lock_of
from kinetoscope.core.sharding import Cut, share_of, take

MERGED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What a change is added to in place; the sum is rounded to it once."""

Wanted = Mapping[str, Weighted]
"""Parameter name -> its changes."""


class Carrier:
    """What one module carries. Made by `carrier_of`, one for each module.

    Runs hold the carrier; while one does, its changes stay as they are.
    """

    def __init__(self) -> None:
        self.carried: dict[str, Weighted] = {}
        self._base: dict[str, Tensor] = {}  # copies on the CPU of what was changed in place
        self._beside: dict[str, SidePath] = {}
        self._holders: set[object] = set()

    @property
    def held(self) -> bool:
        """Whether a run in progress needs the changes as they are."""
        return bool(self._holders)

    def hold(self, holder: object, module: nn.Module, wanted: Wanted, dtype: torch.dtype) -> None:
        """Let the module carry `wanted` until `release`.

        Raises:
            CompositionError: a run in progress needs other changes; or a change that the module cannot take.
        """
        with lock_of(self):
            if self.held and self.carried != dict(wanted):
                raise CompositionError(
                    "a run in progress uses the same weights with other LoRAs; finish or close it before starting this "
                    "one"
                )
            self.carry(module, wanted, dtype)
            self._holders.add(holder)

    def release(self, holder: object) -> None:
        """Let go; what is carried stays."""
        with lock_of(self):
            self._holders.discard(holder)

    def carry_unless_held(self, module: nn.Module, wanted: Wanted, dtype: torch.dtype) -> None:
        """Change the parameters as `carry` does, unless a run in progress needs them as they are."""
        with lock_of(self):
            if not self.held:
                self.carry(module, wanted, dtype)

    @torch.no_grad()
    def carry(self, module: nn.Module, wanted: Wanted, dtype: torch.dtype) -> None:
        """Change the module's parameters from what they carry to `wanted`.

        Args:
            dtype: of the side paths.

        Raises:
            CompositionError: a change that the module cannot take.
        """
        for name in [n for n in self.carried if n not in wanted]:
            self._set(module, name, (), dtype)
            del self.carried[name]
        for name, changes in wanted.items():
            if self.carried.get(name) != changes:
                self._set(module, name, changes, dtype)
                self.carried[name] = changes

    def _set(self, module: nn.Module, name: str, changes: Weighted, dtype: torch.dtype) -> None:
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        value = getattr(owner, leaf, None)
        if isinstance(value, DTensor) or (type(value) is nn.Parameter and value.dtype in MERGED_DTYPES):
            share = share_of(module)
            own = value.to_local() if isinstance(value, DTensor) else value
            self._merge(name, own, changes, value.shape, share.cuts(name) if share else ())
        elif leaf == "weight":
            self._put_beside(name, owner, changes, dtype)
        elif changes:
            raise CompositionError(f"the LoRA changes {name}, which this module keeps in a form that cannot be changed")

    def _merge(
        self, name: str, parameter: Tensor, changes: Weighted, shape: Sequence[int], cuts: Sequence[Cut]
    ) -> None:
        """`parameter` is what is here of one of `shape`."""
        changes = tuple((c, w) for c, w in changes if w)
        if not changes:
            if (base := self._base.pop(name, None)) is not None:
                parameter.copy_(base)
            return
        if name not in self._base:
            self._base[name] = parameter.detach().to("cpu", copy=True)
        total = self._base[name].to(parameter.device, torch.float32, copy=True)
        for change, weight in changes:
            total += weight * take(change.delta(shape, total.device), shape, cuts)
        parameter.copy_(total)

    def _put_beside(self, name: str, owner: nn.Module, changes: Weighted, dtype: torch.dtype) -> None:
        if not changes:
            if (path := self._beside.pop(name, None)) is not None:
                path.remove()
            return
        if any((isinstance(c, LowRank) and c.down.ndim != 2) or (isinstance(c, Full) and c.value.ndim != 2)
               for c, _ in changes):  # fmt: skip
            raise CompositionError(f"the LoRA changes {name}, a quantized layer that is not linear")
        if name not in self._beside:
            self._beside[name] = SidePath(owner)
        self._beside[name].set(changes, dtype)


class SidePath:
    """x -> x (down)^T (up)^T added to the output of a linear layer; scales and weights are inside `up`.

    Another weight rewrites `up` in place, so compiled graphs go on.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._down: Tensor | None = None  # [r of all LoRAs, in]
        self._up: Tensor | None = None  # [out, r of all LoRAs]
        self._full: Tensor | None = None  # [out, in]
        self._handle = layer.register_forward_hook(self._add)
        tensors = [*layer.parameters(), *layer.buffers()]
        self._device = tensors[0].device if tensors else torch.device("cpu")

    def set(self, changes: Weighted, dtype: torch.dtype) -> None:
        """Take the place of what was set before."""
        low = [(c, w) for c, w in changes if isinstance(c, LowRank)]
        full = [(c, w) for c, w in changes if isinstance(c, Full)]
        down = up = whole = None
        if low:
            down = torch.cat([c.down.float() for c, _ in low])
            up = torch.cat([w * c.scale * c.up.float() for c, w in low], 1)
        if full:
            whole = torch.stack([w * c.scale * c.value.float() for c, w in full]).sum(0)
        self._down = self._renewed(self._down, down, dtype)
        self._up = self._renewed(self._up, up, dtype)
        self._full = self._renewed(self._full, whole, dtype)

    def remove(self) -> None:
        """The layer is as it was."""
        self._handle.remove()

    def _renewed(self, old: Tensor | None, new: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if new is None:
            return None
        if old is not None and old.shape == new.shape and old.dtype == dtype:
            return old.copy_(new)
        return new.to(self._device, dtype)

    def _add(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x: Tensor = args[0]
        if self._down is not None and self._up is not None:
            if self._down.device != x.device:  # the layer was moved
                self._down, self._up = self._down.to(x.device), self._up.to(x.device)
            low = F.linear(F.linear(x.to(self._down.dtype), self._down), self._up)
            output = output + low.to(output.dtype)
        if self._full is not None:
            if self._full.device != x.device:
                self._full = self._full.to(x.device)
            output = output + F.linear(x.to(self._full.dtype), self._full).to(output.dtype)
        return output


_CARRIERS: WeakKeyDictionary[nn.Module, Carrier] = WeakKeyDictionary()
_CARRIERS_LOCK = threading.Lock()


def carrier_of(module: nn.Module) -> Carrier:
    """The module's carrier. It belongs to the module, for two generators, also of two threads, may share the module."""
    with _CARRIERS_LOCK:
        return _CARRIERS.setdefault(module, Carrier())
