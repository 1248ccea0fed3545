"""How much memory tensors take while something runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Bytes of the tensors that operations make while this is open, at their most.

    Storages are counted, so views cost nothing. What a kernel needs inside itself is not seen. It works on any device,
    also on "meta", where nothing is computed: then it tells what a run would need.

    Args:
        known: tensors that were there before and do not count.

    Attributes:
        peak: the most bytes that were alive at once.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.peak = self._total = 0
        self._known = {t.untyped_storage()._cdata for t in known}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known or storage._cdata in self._alive:
            return
        self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._total += storage.nbytes()
        if self._total > self.peak:  # else it makes no difference which of them are gone
            self._total -= sum(self._alive.pop(k)[1] for k in [k for k, (s, _) in self._alive.items() if s.expired()])
            self.peak = max(self.peak, self._total)
