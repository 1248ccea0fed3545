"""A bounded memory of encoded prompts that the runs and threads of a pipeline share."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

CACHE_SIZE = 128


class PromptCache(Generic[T]):
    """The encodings of the prompts used last; the one that was not used for the longest time leaves first.

    Args:
        size: number of prompts that are kept.
    """

    def __init__(self, size: int = CACHE_SIZE) -> None:
        self.size = size
        self._kept: OrderedDict[str, T] = OrderedDict()
        self._lock = threading.RLock()

    def get(self, prompt: str, encode: Callable[[], T]) -> T:
        """Return the prompt's encoding, made by `encode` if the cache does not hold it.

        Another thread that asks meanwhile waits, so a prompt is encoded once.
        """
        with self._lock:
            if prompt not in self._kept:
                self._kept[prompt] = encode()
                if len(self._kept) > self.size:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(prompt)
            return self._kept[prompt]
