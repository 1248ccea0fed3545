"""Files that a command writes beside the video: asked for before any work, written through a temporary name."""

from __future__ import annotations

import os
from pathlib import Path

from kinetoscope.core.errors import OutputError


def check_file(path: str | Path, suffix: str) -> Path:
    """Refuse, before any work, a file that could not be written later.

    Raises:
        OutputError: another suffix, a directory, or a place that cannot be created or written.
    """
    path = Path(path)
    if path.suffix.lower() != suffix:
        raise OutputError(f"output {path} should end in {suffix}")
    if path.is_dir():
        raise OutputError(f"output {path} is a directory; name a file in it")
    parent = path.absolute().parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError(f"output {path}: {parent} is not a directory")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"output {path}: no permission to write in {parent}")
    return path


def write_text(path: Path, text: str) -> Path:
    """Write a whole file or nothing.

    Raises:
        OutputError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path
