"""Recognising that there is no more memory."""

from __future__ import annotations

import torch

_WORDS = ("can't allocate memory", "cannot allocate memory", "out of memory", "bad_alloc", "can't start new thread")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, in one of the ways in which torch and the system do."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError | OSError | ImportError) and any(w in text for w in _WORDS)
