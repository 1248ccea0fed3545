"""The hash of a model's files, which a record holds: read while the first video is made, not after it."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from typing import Any, TypeVar

from kinetoscope.core.errors import KinetoscopeError
from kinetoscope.loading import ModelDir
from kinetoscope.pipelines.composed import StageEvent

T = TypeVar("T")

STAGE = "model_hash"
"""Name of the stage in which a request waits for the hash."""
AHEAD = 64 << 20
"""Bytes of a model from which on its files are read by a thread; fewer take about a tenth of a second."""


class ModelHash:
    """Hashes the files of a model in a thread that begins with the first step of a run.

    By then the weights are loaded, so the files are in the system's cache. Digests of files are remembered for the
    process (`loading.directory.file_digest`), so later requests find them.

    Args:
        model: the directory.
    """

    def __init__(self, model: ModelDir) -> None:
        self._model = model
        self._thread: threading.Thread | None = None

    def among(self, events: Generator[Any, None, T]) -> Generator[Any, None, T]:
        """Yield the events of a run; the first step among them starts the thread."""
        try:
            while True:
                try:
                    event = next(events)
                except StopIteration as stop:
                    return stop.value
                if event.kind == "step":
                    self._start()
                yield event
        finally:
            events.close()

    def wait(self, videos: tuple[int, ...]) -> Generator[StageEvent, None, None]:
        """Wait until the files are read; yield a stage if that takes time."""
        thread = self._thread
        if thread is None or not thread.is_alive():
            return
        yield StageEvent("stage_start", STAGE, videos=videos)
        start = time.perf_counter()
        thread.join()
        yield StageEvent("stage_end", STAGE, time.perf_counter() - start, videos)

    def _start(self) -> None:
        if self._thread is None and self._model.size() >= AHEAD:
            self._thread = threading.Thread(target=self._read, name="kinetoscope-model-hash", daemon=True)
            self._thread.start()

    def _read(self) -> None:
        try:
            self._model.fingerprint()
        except (KinetoscopeError, OSError):
            return  # the record asks again, and raises it there
