"""Text files that commands write."""

from __future__ import annotations

from pathlib import Path

from kinetoscope.core.errors import OutputError


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
