"""A pretend accelerator for machines without one: a tensor of device "pretend:0" holds its data on the CPU.

The pretend device counts what a GPU punishes: operations on tensors of two devices (an error on a GPU), reads of a
device value by the host (a synchronisation), copies from pageable host memory (a stall), and launched kernels. Values
are those of the CPU, so a result can be compared with a run on "cpu".

    with pretend_device() as counts:
        x = torch.ones(3, device=DEVICE)
        x.sum().item()
    assert not counts.mixes and counts.syncs.total() == 1

`pretend_device` registers the device for the whole process and changes `Module.to` and `torch.accelerator`: use it in a
process of its own. The count is per thread: a thread that runs an engine enters `pretend_device` too. The registration
function of torch is experimental (torch 2.13).
"""

from __future__ import annotations

import linecache
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretend"
DEVICE = f"{NAME}:0"
SOURCE = "/src/kinetoscope/"
"""Part of the file names in which the place of a count is looked up first."""
VIEWS = frozenset(
    {
        *("view", "reshape", "permute", "transpose", "unsqueeze", "squeeze", "expand", "slice", "select", "split"),
        *("chunk", "unbind", "t", "as_strided", "detach", "alias", "_unsafe_view", "split_with_sizes", "unflatten"),
        *("lift_fresh", "_reshape_alias", "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"),
        *("unfold", "diagonal", "movedim", "narrow", "is_same_size", "view_as_complex", "view_as_real", "is_pinned"),
    }
)
"""Operators that launch no kernel."""
HOST_READS = frozenset(["nonzero", "equal", "is_nonzero", "masked_select", "unique2", "_unique2"])
"""Operators whose result, or its size, the host reads."""
HOST_INDEX = frozenset(["index", "index_put", "index_put_", "_index_put_impl_"])
"""Operators that accept index tensors of the host, and copy them to the device."""

PHYSICAL: dict[str, Any] = {"_conj": torch.ops.aten._conj_physical.default, "_neg_view": torch.ops.aten.neg.default}
"""Operators whose result is a view with a mark, which a wrapped tensor cannot carry, and those that compute it."""


@dataclass
class Counts:
    """What happened on the pretend device, each counted by place ("file:line source").

    Attributes:
        mixes: operations on tensors of both devices.
        syncs: reads of a device value by the host.
        copies: copies from pageable host memory.
        pinned: asynchronous copies from or to pinned host memory, which stall nothing.
        launches: kernels, counted by operator.
    """

    mixes: Counter[str] = field(default_factory=Counter)
    syncs: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    pinned: Counter[str] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)

    def copy(self) -> Counts:
        """Return the counts of this moment."""
        return Counts(*(Counter(getattr(self, name)) for name in self.__dataclass_fields__))

    def since(self, before: Counts) -> Counts:
        """Return what was counted after `before` was copied."""
        return Counts(*(getattr(self, name) - getattr(before, name) for name in self.__dataclass_fields__))

    def totals(self) -> dict[str, int]:
        """Return the number of each kind."""
        return {name: getattr(self, name).total() for name in self.__dataclass_fields__}


COUNTS = Counts()


def _place() -> str:
    """Return the innermost line of this package on the stack, else the innermost one outside of torch."""
    frame, library = sys._getframe(2), ""
    while frame is not None:
        name = frame.f_code.co_filename
        if SOURCE in name:
            return _line(name.split(SOURCE)[-1], name, frame.f_lineno)
        if not library and "/torch/" not in name and name != __file__:
            library = _line(name.split("site-packages/")[-1], name, frame.f_lineno)
        frame = frame.f_back
    return library


def _line(short: str, file: str, number: int) -> str:
    return f"{short}:{number} {linecache.getline(file, number).strip()}"


class PretendTensor(Tensor):
    """A tensor of the pretend device; `held` has its values."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @staticmethod
    def __new__(cls, held: Tensor) -> PretendTensor:
        made = torch.Tensor._make_wrapper_subclass(  # pyright: ignore
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=DEVICE, requires_grad=False,
        )  # fmt: skip
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"PretendTensor({tuple(self.shape)}, {self.dtype})"

    def tolist(self) -> Any:
        """Return the values as Python numbers: one synchronisation."""
        COUNTS.syncs[f"tolist {_place()}"] += 1
        return self.detach().held.tolist()  # pyright: ignore

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


def _held(x: Any) -> Any:
    return x.held if isinstance(x, PretendTensor) else x


def _wrap(x: Any) -> Any:
    return PretendTensor(x) if isinstance(x, Tensor) and not isinstance(x, PretendTensor) else x


def _is_pretend(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


_PINNED: dict[int, Tensor] = {}
"""Address -> pinned host memory, which is kept so that no other tensor gets its address."""


def _is_pinned(x: Tensor) -> bool:
    return x.untyped_storage().data_ptr() in _PINNED


def _call(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the data of its tensors, and count what a GPU would punish."""
    name = func._schema.name.split("::")[1]  # pyright: ignore[reportFunctionMemberAccess]
    leaves = tree_leaves((args, kwargs))
    ours = [x for x in leaves if isinstance(x, PretendTensor)]
    host = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, PretendTensor)]
    target = kwargs.get("device")
    if (ours or _is_pretend(target)) and name not in VIEWS:
        COUNTS.launches[name] += 1
    if name == "_local_scalar_dense" and ours:
        COUNTS.syncs[f"item {_place()}"] += 1
        return func(args[0].held)
    if ours and (name in HOST_READS or (name == "repeat_interleave" and kwargs.get("output_size") is None)):
        COUNTS.syncs[f"{name} {_place()}"] += 1
    if name == "_to_copy":
        return _moved(func, args[0], kwargs)
    if name == "copy_":
        _count_copy(args[1], isinstance(args[0], PretendTensor), f"copy_ {_place()}")
        func(_held(args[0]), _held(args[1]), *args[2:])
        return args[0]
    if ours and any(x.dim() > 0 for x in host):
        if name in HOST_INDEX:
            COUNTS.copies[f"{name} {_place()}"] += 1
        else:
            COUNTS.mixes[f"{name} {_place()}"] += 1
    if _is_pretend(target):
        kwargs = {**kwargs, "device": torch.device("cpu")}
    func = PHYSICAL.get(name, func)
    out = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    if (target is None and not ours) or (target is not None and not _is_pretend(target)):
        return out
    if name.endswith("_") and not name.endswith("__") and isinstance(args[0], PretendTensor):
        return args[0]
    return tree_map(_wrap, out)


def _moved(func: Callable[..., Any], source: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Convert `source` to another dtype, device or memory format."""
    target = kwargs.get("device")
    goes = _is_pretend(target) if target is not None else isinstance(source, PretendTensor)
    _count_copy(source, goes, _place(), bool(kwargs.get("non_blocking")))
    kept = {k: v for k, v in kwargs.items() if v is not None and k not in ("device", "pin_memory")}
    out = func(_held(source), **kept)
    return PretendTensor(out) if goes else out


def _count_copy(source: Tensor, goes: bool, place: str, non_blocking: bool = False) -> None:
    """Count a copy of `source` between the two devices; `goes` tells whether the result is on the pretend device."""
    if isinstance(source, PretendTensor) and not goes:
        (COUNTS.pinned if non_blocking else COUNTS.syncs)[f"to host {place}"] += 1
    if not isinstance(source, PretendTensor) and goes:
        (COUNTS.pinned if _is_pinned(source) else COUNTS.copies)[place] += 1


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


def _copy_from(source: Tensor, into: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy for tensors that torch makes from Python values."""
    _held(into).copy_(_held(source))
    _count_copy(source, isinstance(into, PretendTensor), f"made on the host {_place()}")
    return into


def _pin_memory(x: Tensor, device: Any = None) -> Tensor:
    """Return a copy of a host tensor that counts as pinned."""
    pinned = x.clone()
    _PINNED[pinned.untyped_storage().data_ptr()] = pinned
    return pinned


class _Event:
    """An event of a device whose work is done at once."""

    def __init__(self, device: Any = None) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True


_LIBRARY: torch.library.Library | None = None


def _register() -> None:
    """Register the device with torch, once in a process."""
    global _LIBRARY
    if _LIBRARY is not None:
        return
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend  # pyright: ignore

    _setup_privateuseone_for_python_backend(NAME)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.Tensor.pin_memory = _pin_memory  # pyright: ignore
    torch.Event = _Event  # pyright: ignore
    torch.pretend.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]  # pyright: ignore
    library = torch.library.Library("aten", "IMPL")
    library.impl(
        "empty_strided",
        lambda size, stride, dtype=None, layout=None, device=None, pin_memory=None: PretendTensor(
            torch.empty_strided(size, stride, dtype=dtype)
        ),
        "PrivateUse1",
    )
    library.impl(
        "empty.memory_format",
        lambda size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None: PretendTensor(
            torch.empty(size, dtype=dtype)
        ),
        "PrivateUse1",
    )
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    _LIBRARY = library


@contextmanager
def pretend_device() -> Iterator[Counts]:
    """Make the device "pretend:0" exist inside the `with`, and count from zero what happens on it."""
    _register()
    for name in Counts.__dataclass_fields__:
        getattr(COUNTS, name).clear()
    with _Mode():
        yield COUNTS
