"""Files that are written whole or not at all, and names that a file system can hold."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Generator
from pathlib import Path

from kinetoscope.core.errors import OutputError

PART = ".part"
"""End of a temporary name; a file under it that no process writes any more may be deleted."""
NAME_BYTES, PATH_BYTES = 255, 4096
"""Limits where the file system does not tell its own."""


def check_output_path(path: str | Path) -> Path:
    """Return `path` if a file can be written there later; no file is made.

    Raises:
        OutputError: the file system cannot hold the name, the path is a directory, or a file cannot be made there.
    """
    path = Path(path)
    _check_name(path)
    if path.is_dir():
        raise OutputError(f"output {path} is a directory; name a file in it")
    parent = _existing_parent(path)
    if not parent.is_dir():
        raise OutputError(f"output {path}: {parent} is not a directory")
    try:  # permission bits do not tell: a superuser passes them, and read-only or virtual file systems do not keep them
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise OutputError(f"output {path}: cannot write in {parent} ({error.strerror})") from error
    return path


def temporary_beside(path: Path) -> Path:
    """Return a short path in the folder of `path` that no other process or thread has.

    Raises:
        OutputError: the file system cannot hold `path`.
    """
    _check_name(path)
    return path.with_name(f".{secrets.token_hex(6)}{PART}")


@contextlib.contextmanager
def replacing(path: str | Path, *, sync: bool = True) -> Generator[Path, None, None]:
    """Yield a temporary path in the folder of `path`; the file that is written there becomes `path` at the end.

    The temporary name is short and no other process or thread has it. Missing folders are made. After any error the
    temporary file is removed and what was at `path` before stays.

    Args:
        path: the file to write.
        sync: wait until the data are on the disk before the file gets its name.

    Raises:
        OutputError: the file cannot be written.
    """
    path = Path(path)
    temporary = temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if sync:
            _sync(temporary)
        temporary.replace(path)
        if sync:
            _sync(path.parent)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Write a whole file or nothing.

    Raises:
        OutputError: the file cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    return Path(path)


def write_text(path: str | Path, text: str) -> Path:
    """Write a whole file in UTF-8 or nothing; bytes of a file name that are not UTF-8 are written as they were.

    Raises:
        OutputError: the file cannot be written, or the text holds surrogates that stand for no byte.
    """
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise OutputError(f"{path} cannot be written: its text is not valid Unicode ({error.reason})") from error
    return write_bytes(path, data)


def _check_name(path: Path) -> None:
    """Refuse a path that no file can have."""
    try:
        absolute = os.fsencode(path.absolute())
    except UnicodeEncodeError as error:
        raise OutputError(f"output {str(path)!r} is not valid Unicode text; use another name") from error
    if b"\0" in absolute:
        raise OutputError(f"output {str(path)!r} holds a null character; use another name")
    folder = _existing_parent(path)
    longest = max(os.path.dirname(absolute) + b"/" + b"." * (len(PART) + 13), absolute, key=len)  # noqa: PTH120 - bytes
    if len(longest) >= (limit := _limit(folder, "PC_PATH_MAX", PATH_BYTES)):
        raise OutputError(f"output {_short(path)} has {len(longest)} bytes, and {limit - 1} are allowed; shorten it")
    limit = _limit(folder, "PC_NAME_MAX", NAME_BYTES)
    for part in absolute.split(b"/"):
        if len(part) > limit:
            name = os.fsdecode(part)
            raise OutputError(
                f"output {_short(path)}: the name {name[:20]}... has {len(part)} bytes, and {limit} are allowed; "
                "shorten it"
            )


def _existing_parent(path: Path) -> Path:
    """Return the nearest folder above `path` that exists."""
    parent = path.absolute().parent
    while parent != parent.parent:
        with contextlib.suppress(OSError):  # a name that is too long
            if parent.exists():
                break
        parent = parent.parent
    return parent


def _limit(folder: Path, name: str, default: int) -> int:
    """Return a limit of the file system of `folder`."""
    try:
        return os.pathconf(folder, name)
    except (OSError, ValueError, AttributeError):
        return default


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 60 else f"{text[:25]}...{text[-25:]}"


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
