"""Files that are written whole or not at all, and names that a file system can hold."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from kinetoscope.core.errors import InputError, KinetoscopeError, OutputError, shown

PART = ".part"
"""End of a temporary name; a file under it that no process writes any more may be deleted."""
NAME_BYTES, PATH_BYTES = 255, 4096
"""Limits where the file system does not tell its own."""
_WRITE_ERRORS = (OSError, SafetensorError)
"""Errors of writing a file; safetensors reports a full disk by its own class."""


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
        raise OutputError(f"output {path}: cannot write in {parent} ({system_reason(error)})") from error
    return path


def temporary_beside(path: Path) -> Path:
    """Return a short path in the folder of `path` that no other process or thread has.

    Raises:
        OutputError: the file system cannot hold `path`.
    """
    _check_name(path)
    return path.with_name(f".{secrets.token_hex(6)}{PART}")


@contextlib.contextmanager
def replacing(path: str | Path, *, sync: bool = True, make_folder: bool = True) -> Generator[Path, None, None]:
    """Yield a temporary path in the folder of `path`; the file that is written there becomes `path` at the end.

    The temporary name is short and no other process or thread has it. After any error the temporary file is removed and
    what was at `path` before stays.

    Args:
        path: the file to write.
        sync: wait until the data are on the disk before the file gets its name.
        make_folder: make the folder of `path` if it is missing; False: a missing folder is an error.

    Raises:
        OutputError: the file cannot be written.
    """
    path = Path(path)
    temporary = temporary_beside(path)
    try:
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        publish(temporary, path, sync=sync)
    except _WRITE_ERRORS as error:
        raise _unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def publish(temporary: Path, path: Path, *, sync: bool = True) -> None:
    """Give a whole file its name; a file that has the name already is replaced.

    Args:
        temporary: the file, in the same file system as `path`.
        path: its name.
        sync: wait until the data are on the disk before the file gets its name.

    Raises:
        OSError: the file cannot get the name.
    """
    if sync:
        _sync(temporary)
    temporary.replace(path)
    if sync:
        _sync(path.parent)


@contextlib.contextmanager
def replacing_folder(folder: str | Path) -> Generator[Path, None, None]:
    """Yield a new folder beside `folder`; with all that is written in it, it becomes `folder` at the end.

    The temporary name is as in `replacing`. After any error the new folder is removed and what was at `folder` before
    stays. A process that is killed leaves the folder of the temporary name.

    Args:
        folder: the folder to write.

    Raises:
        OutputError: the folder cannot be written.
    """
    folder = Path(folder)
    temporary = temporary_beside(folder)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        publish_folder(temporary, folder)
    except OutputError as error:  # of a file in the folder
        raise OutputError(str(error).replace(str(temporary), str(folder))) from error
    except _WRITE_ERRORS as error:
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_folder(temporary: Path, folder: Path) -> None:
    """Give a whole folder its name, when its data are on the disk; a folder that has the name already is replaced.

    A file system cannot exchange two folders in one step. The old folder gets a temporary name first, so a process that
    is killed at that moment leaves both folders under temporary names.

    Args:
        temporary: the folder, in the same file system as `folder`.
        folder: its name.

    Raises:
        OSError: the folder cannot get the name; the old folder stays.
    """
    for path in (*temporary.rglob("*"), temporary):
        _sync(path)
    old = temporary_beside(folder)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(old)
    try:
        temporary.rename(folder)
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            old.rename(folder)
        raise
    _sync(folder.parent)
    remove(old)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, as far as it can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


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


def write_json(path: str | Path, value: Any) -> Path:
    """Write a whole file of JSON, indented by two spaces, or nothing.

    Raises:
        OutputError: the file cannot be written.
    """
    return write_text(path, json.dumps(value, indent=2) + "\n")


def append_line(path: str | Path, line: str) -> None:
    """Add a line to the end of a log in UTF-8, whole or not at all; a missing folder is made.

    Args:
        path: the log; one process writes it.
        line: the text without the line break.

    Raises:
        OutputError: the line cannot be written.
    """
    path, data = Path(path), f"{line}\n".encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        raise _unwritable(path, error) from error


def name_problem(path: str | Path) -> str:
    """Return why the file system can hold no file of this path, or an empty string."""
    path = Path(path)
    try:
        absolute = os.fsencode(path.absolute())
    except UnicodeEncodeError:
        return "the name is not valid Unicode text; use another name"
    if b"\0" in absolute:
        return "the name holds a null character; use another name"
    folder = _existing_parent(path)
    longest = max(os.path.dirname(absolute) + b"/" + b"." * (len(PART) + 13), absolute, key=len)  # noqa: PTH120 - bytes
    if len(longest) >= (limit := _limit(folder, "PC_PATH_MAX", PATH_BYTES)):
        return f"the path has {len(longest)} bytes, and {limit - 1} are allowed; shorten it"
    limit = _limit(folder, "PC_NAME_MAX", NAME_BYTES)
    for part in absolute.split(b"/"):
        if len(part) > limit:
            name = os.fsdecode(part)
            return f"the name {name[:20]}... has {len(part)} bytes, and {limit} are allowed; shorten it"
    return ""


def path_exists(path: str | Path) -> bool:
    """Return whether there is a file or folder; False for a path that none can have."""
    return not name_problem(path) and Path(path).exists()


def read_text(path: str | Path, error: type[KinetoscopeError] = InputError, what: str = "file") -> str:
    """Return the text of a file that a user gave, in UTF-8 with or without a byte order mark.

    Args:
        path: the file.
        error: what is raised.
        what: what the file is called in the message.

    Raises:
        KinetoscopeError: the file is missing, cannot be read, or is not UTF-8 text.
    """
    if why := name_problem(path):
        raise error(f"{what} {shown(str(path))} cannot be read: {why}")
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as cause:
        raise error(f"{what} {path} cannot be read: it is not text in UTF-8 (byte {cause.start})") from cause
    except OSError as cause:
        raise error(f"{what} {path} cannot be read: {system_reason(cause)}") from cause


def system_reason(error: BaseException) -> str:
    """Return what an error of the system or of FFmpeg says, without its number and without the paths it names."""
    return getattr(error, "strerror", None) or str(error)


def _unwritable(path: Path, error: Exception) -> OutputError:
    """Return the error that a file or folder cannot be written."""
    return OutputError(f"{path} cannot be written: {system_reason(error)}")


def _check_name(path: Path) -> None:
    """Refuse a path that no file can have."""
    if why := name_problem(path):
        raise OutputError(f"output {shown(str(path))}: {why}")
    if not path.name:
        raise OutputError(f"output {str(path)!r} is a folder; name a file in it")


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


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
