"""Weights that are on the device only while they are used.

Two grains. A *component* (text encoder, transformer, VAE) comes when a stage asks for it and leaves when the stage is
done. Of a transformer that is larger than the device, only what is around its blocks comes as a component; each *block*
comes for its own forward, and the next one comes while it computes. On CUDA weights wait in pinned memory and come by a
stream of their own; on other devices the same steps run one after another.

Weights are not changed by inference, so leaving costs nothing: the module gets its resting tensors back. What was
changed in place on the device meanwhile (a LoRA) is copied back first. The arithmetic is the same, so results are
bit-equal.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from typing import Any, Protocol

import torch
from torch import Tensor, nn

OFFLOADS: dict[str, str] = {
    "components": "a component is on the device while its stage runs",
    "blocks": "and of the transformer two blocks at a time",
}
_METHODS = ("forward", "encode", "decode")
_PREFIXES = ("prepare_", "new_")


class Mover(Protocol):
    """Where weights rest, and how they come."""

    def park(self, tensor: Tensor) -> Tensor:
        """What stands in the module while the weight is away."""
        ...

    def bring(self, parked: Tensor) -> Tensor:
        """The weight on the device; it may still be on its way."""
        ...

    def ahead(self) -> AbstractContextManager[Any]:
        """`bring` inside this does not wait for what the device computes."""
        ...

    def sent(self) -> Any:
        """A mark after everything brought so far."""
        ...

    def arrived(self, mark: Any, tensors: Sequence[Tensor]) -> None:
        """Let the device wait for a mark; `tensors` came before it."""
        ...


class HostMover:
    """Weights rest in the memory of the host, pinned where the device is not the CPU.

    Args:
        device: where they are used.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def park(self, tensor: Tensor) -> Tensor:
        """On the CPU."""
        resting = tensor.to("cpu")
        return resting if self.device.type == "cpu" else changed_parts(resting, Tensor.pin_memory)

    def bring(self, parked: Tensor) -> Tensor:
        """On the device."""
        return parked.to(self.device, non_blocking=True)

    def ahead(self) -> AbstractContextManager[Any]:
        """On a stream of its own."""
        return torch.cuda.stream(self._stream) if self._stream else nullcontext()

    def sent(self) -> Any:
        """An event of that stream."""
        return self._stream.record_event() if self._stream else None

    def arrived(self, mark: Any, tensors: Sequence[Tensor]) -> None:
        """The computing stream waits, and the allocator keeps what it still reads."""
        if self._stream is None:
            return
        computing = torch.cuda.current_stream(self.device)
        computing.wait_event(mark)
        for tensor in tensors:
            changed_parts(tensor, lambda part: part.record_stream(computing))


def changed_parts(tensor: Tensor, change: Callable[[Tensor], Any]) -> Tensor:
    """`tensor`, or a tensor subclass by its parts (quantized weights), changed; as it was where `change` gives None."""
    if not hasattr(tensor, "__tensor_flatten__"):
        changed = change(tensor)
        return tensor if changed is None else changed
    names, context = tensor.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    parts = {name: changed_parts(getattr(tensor, name), change) for name in names}
    kind: Any = type(tensor)
    return kind.__tensor_unflatten__(parts, context, tensor.size(), tensor.stride())


class Slot:
    """One parameter or buffer of a module, at rest or here."""

    def __init__(self, owner: nn.Module, name: str, *, buffer: bool) -> None:
        self._store: dict[str, Any] = owner._buffers if buffer else owner._parameters
        self._name = name
        self._buffer = buffer
        self._parked: Tensor | None = None
        self._version = 0

    @property
    def value(self) -> Tensor:
        """What stands in the module now."""
        return self._store[self._name]

    def put(self, tensor: Tensor) -> None:
        """Let it stand in the module."""
        if not self._buffer and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        self._store[self._name] = tensor

    def replace(self, make: Callable[[Tensor], Tensor], known: dict[Any, Tensor]) -> None:
        """Put what `make` makes of the weight; one that several names share (`known`) is made once."""
        key = _identity(self.value)
        self.put(known[key] if key in known else make(self.value))
        known[key] = self.value

    def bring(self, mover: Mover, known: dict[Any, Tensor]) -> Tensor:
        """Let the weight come."""
        self._parked = self.value
        self.replace(mover.bring, known)
        self._version = self.value._version
        return self.value

    def leave(self) -> None:
        """Let it rest again."""
        assert self._parked is not None
        if self.value._version != self._version:
            self._parked.copy_(self.value)
        self._store[self._name] = self._parked


def _identity(tensor: Tensor) -> Any:
    """What tensors have in common that are one weight under several names."""
    if hasattr(tensor, "__tensor_flatten__") or tensor.is_meta:
        return id(tensor)
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape)


def slots(module: nn.Module, leave_out: Sequence[nn.Module] = ()) -> Iterator[Slot]:
    """All parameters and buffers of a module but the weights of the `leave_out` layers."""
    out = {id(m) for m in leave_out}
    for owner in module.modules():
        for name, value in owner._parameters.items():
            if value is not None and not (name == "weight" and id(owner) in out):
                yield Slot(owner, name, buffer=False)
        for name, value in owner._buffers.items():
            if value is not None:
                yield Slot(owner, name, buffer=True)


def heavy_layers(block: nn.Module) -> list[nn.Module]:
    """The layers of a block whose weights are worth moving: products. Norms, biases and tables are small, and are read
    outside the block too."""
    return [m for m in block.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv3d)]


class OffloadedBlocks:
    """The weights of the blocks of a transformer, each here for its own forward, and the next one's on their way.

    A layer of a block that is called while its block is not running (keys and values of a text, before the first step)
    comes alone for that call.

    Args:
        blocks: in the order in which they usually run.
        mover: moves weights.
    """

    def __init__(self, blocks: Sequence[nn.Module], mover: Mover) -> None:
        self._blocks = list(blocks)
        self._mover = mover
        self._here: dict[int, tuple[list[Slot], Any, list[Tensor]]] = {}
        self._guards: dict[int, list[Any]] = {}
        for index, block in enumerate(self._blocks):
            for slot in self._slots(index):
                slot.put(mover.park(slot.value))
            block.register_forward_pre_hook(lambda *_, i=index: self._enter(i))
            block.register_forward_hook(lambda *_, i=index: self._leave(i), always_call=True)
            self._guard(index)

    def clear(self) -> None:
        """Nothing is here any more."""
        for index in list(self._here):
            self._drop(index)

    def _slots(self, index: int) -> list[Slot]:
        layers = heavy_layers(self._blocks[index])
        return [Slot(layer, "weight", buffer=False) for layer in layers if layer._parameters.get("weight") is not None]

    def _fetch(self, index: int) -> None:
        with self._mover.ahead():
            found = self._slots(index)
            known: dict[Any, Tensor] = {}
            brought = [slot.bring(self._mover, known) for slot in found]
            self._here[index] = (found, self._mover.sent(), brought)

    def _enter(self, index: int) -> None:
        for handle in self._guards.pop(index, ()):
            handle.remove()
        for other in [i for i in self._here if i != index]:
            self._drop(other)
        if index not in self._here:
            self._fetch(index)
        _, mark, brought = self._here[index]
        self._mover.arrived(mark, brought)
        following = (index + 1) % len(self._blocks)
        if following not in self._here:
            self._fetch(following)

    def _leave(self, index: int) -> None:
        self._drop(index)
        self._guard(index)

    def _drop(self, index: int) -> None:
        found, _, _ = self._here.pop(index, ((), None, ()))
        for slot in found:
            slot.leave()

    def _guard(self, index: int) -> None:
        """Watch the layers of a block that does not run. The watch goes when it runs: a hooked layer is not a plain
        one, and takes slower paths."""
        if index in self._guards:
            return
        handles: list[Any] = []
        for layer in heavy_layers(self._blocks[index]):
            alone: list[Slot] = []
            handles.append(layer.register_forward_pre_hook(partial(self._come_alone, index, alone)))
            handles.append(layer.register_forward_hook(partial(_go, alone), always_call=True))
        self._guards[index] = handles

    def _come_alone(self, index: int, alone: list[Slot], layer: nn.Module, args: Any) -> None:
        if index in self._here:
            _, mark, brought = self._here[index]
            self._mover.arrived(mark, brought)
            return
        slot = Slot(layer, "weight", buffer=False)
        slot.bring(self._mover, {})
        alone.append(slot)


def _go(alone: list[Slot], *call: Any) -> None:
    for slot in alone:
        slot.leave()
    alone.clear()


class Offload:
    """One component at a time on the device; threads take turns, call by call.

    Args:
        kind: of `OFFLOADS`.
        device: where components are used.
        mover: moves weights; None: between the host and the device.
    """

    def __init__(self, kind: str, device: torch.device, mover: Mover | None = None) -> None:
        self.kind = kind
        self._mover = mover or HostMover(device)
        self._modules: dict[str, nn.Module] = {}
        self._blocks: dict[str, OffloadedBlocks] = {}
        self._here: str | None = None
        self._slots: list[Slot] = []
        self._turn = threading.RLock()

    @property
    def here(self) -> str | None:
        """The component that is on the device."""
        return self._here

    def add(self, name: str, module: nn.Module) -> None:
        """Take charge of a component that was loaded to the host."""
        blocks: Sequence[nn.Module] = getattr(module, "blocks", ())
        if self.kind == "blocks" and name.startswith("transformer") and len(blocks):
            self._blocks[name] = OffloadedBlocks(blocks, self._mover)
        self._modules[name] = module
        known: dict[Any, Tensor] = {}
        loaded = [slot.value for slot in self._own(name)]  # kept, so that no address is taken twice
        for slot in self._own(name):
            slot.replace(self._mover.park, known)
        del loaded
        for part, method in _entrances(module):
            setattr(part, method, self._coming(name, getattr(part, method)))

    def need(self, name: str) -> None:
        """The component is on the device when this returns, and no other is."""
        with self._turn:
            if name == self._here or name not in self._modules:
                return
            self.release()
            self._here = name
            self._slots = list(self._own(name))
            known: dict[Any, Tensor] = {}
            with self._mover.ahead():
                brought = [slot.bring(self._mover, known) for slot in self._slots]
                mark = self._mover.sent()
            self._mover.arrived(mark, brought)

    def release(self) -> None:
        """No component is on the device any more."""
        with self._turn:
            for blocks in self._blocks.values():
                blocks.clear()
            for slot in self._slots:
                slot.leave()
            self._here, self._slots = None, []

    def _own(self, name: str) -> Iterator[Slot]:
        module: Any = self._modules[name]
        heavy = [m for b in module.blocks for m in heavy_layers(b)] if name in self._blocks else []
        return slots(module, heavy)

    def _coming(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """`method`, before which the component comes: who holds the module may call it when it is away."""

        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._turn:  # until the call ends: another thread would send the component away
                self.need(name)
                return method(*args, **kwargs)

        return call


def _entrances(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """(module, method) by which others enter a component: its own methods, and forwards of its direct parts."""
    for name in dir(type(module)):
        if name in _METHODS or name.startswith(_PREFIXES):
            yield module, name
    for part in module.children():
        if not isinstance(part, nn.ModuleList):
            yield part, "forward"
