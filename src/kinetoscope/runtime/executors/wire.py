"""Messages between processes of one machine: small ones through a pipe, arrays through memory that both have.

The memory has no name: only its descriptor is passed on, so that nothing is left of it when both ends are gone, however
they went.
"""

from __future__ import annotations

import mmap
import os
import pickle
import struct
import tempfile
import threading
from collections.abc import Callable
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

SHARED = 1 << 15
"""Arrays of at least so many bytes travel in shared memory."""
ALIGNMENT = 64

Send = Callable[[Any], None]


class Wire:
    """One end of a pair of sockets. Any thread may send; one receives.

    Args:
        descriptor: of the socket (a Unix one), which the wire owns from now on.
    """

    def __init__(self, descriptor: int) -> None:
        self._connection: Any = Connection(descriptor)
        self._sending = threading.Lock()

    def send(self, message: Any) -> None:
        """Send what can be pickled.

        Raises:
            OSError: the other end is gone.
        """
        kept: list[Any] = []

        def outside(buffer: pickle.PickleBuffer) -> bool:
            raw = buffer.raw()
            if raw.nbytes < SHARED:
                return True
            kept.append(raw)
            return False

        data = pickle.dumps(message, protocol=5, buffer_callback=outside)
        sizes = [raw.nbytes for raw in kept]
        with self._sending:
            descriptor = _filled(kept) if kept else None
            try:
                self._connection.send_bytes(struct.pack(f"<{len(sizes)}q", *sizes))
                self._connection.send_bytes(data)
                if descriptor is not None:
                    reduction.send_handle(self._connection, descriptor, 0)
            finally:
                if descriptor is not None:
                    os.close(descriptor)

    def receive(self) -> Any:
        """The next message; its arrays stay in the memory in which they came.

        Raises:
            EOFError, OSError: the other end is gone.
        """
        header = self._connection.recv_bytes()
        sizes = struct.unpack(f"<{len(header) // 8}q", header)
        data = self._connection.recv_bytes()
        if not sizes:
            return pickle.loads(data)
        descriptor = reduction.recv_handle(self._connection)
        try:
            memory = memoryview(mmap.mmap(descriptor, _places(sizes)[-1]))
        finally:
            os.close(descriptor)
        starts = _places(sizes)
        return pickle.loads(data, buffers=[memory[s : s + n] for s, n in zip(starts, sizes, strict=False)])

    def close(self) -> None:
        """Close this end."""
        self._connection.close()


def _places(sizes: tuple[int, ...] | list[int]) -> list[int]:
    """Where each array begins, and the size of all."""
    places = [0]
    for size in sizes:
        places.append(-(-(places[-1] + size) // ALIGNMENT) * ALIGNMENT)
    return places


def _filled(parts: list[memoryview]) -> int:
    """The descriptor of nameless memory that holds `parts`."""
    places = _places([p.nbytes for p in parts])
    descriptor = _memory()
    try:
        os.ftruncate(descriptor, places[-1])
        with mmap.mmap(descriptor, places[-1]) as memory:
            for start, part in zip(places, parts, strict=False):
                memory[start : start + part.nbytes] = part
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _memory() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("kinetoscope")
    with tempfile.TemporaryFile() as file:  # without a name, too
        return os.dup(file.fileno())
