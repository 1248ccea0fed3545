"""A lock on the name of a file or folder, among the processes and threads of all machines that share the folder."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from kinetoscope.core.errors import OutputError

SUFFIX = ".lock"
"""End of the name of a lock file. The file stays, since removing it would let two processes hold two locks."""

logger = logging.getLogger("kinetoscope.files")


@contextmanager
def file_lock(path: str | Path, *, busy: Exception | None = None) -> Generator[None]:
    """Hold the lock on `path`; the operating system gives it back however the process ends.

    The lock is advisory: it is for programs that make `path` inside of it. A program that only reads `path` needs none
    where the file gets its name when it is whole (`core.files.replacing`).

    Args:
        path: file or folder that is made; its own folder is made if it is missing. The lock file lies beside it.
        busy: raised where another process holds the lock; None: wait for it, and tell so in the log.

    Raises:
        OutputError: the lock file cannot be written, or the file system has no locks.
    """
    path = Path(path)
    file = path.with_name(path.name + SUFFIX)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise OutputError(f"{file} cannot be written: {error.strerror or error}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if busy is not None:
                raise busy from None
            logger.warning("waiting for another process that makes %s", path)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            raise OutputError(f"{file} cannot be locked: {error.strerror or error}") from error
        yield
    finally:
        os.close(handle)
