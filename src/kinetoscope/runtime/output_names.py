"""Names of the files that videos are written to."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from kinetoscope.core.errors import InputError
from kinetoscope.media import check_output
from kinetoscope.media.video import SUFFIXES

LETTERS, BYTES = 48, 96
"""Length of the readable part of a name."""


def slug(prompt: str, limit: int = LETTERS) -> str:
    """Return the prompt's letters and digits, of any script, as whole words of at most `limit` characters.

    The result holds no path separator, no space and no underscore, and has at most `BYTES` bytes in UTF-8; it is
    "video" for a prompt without letters and digits. Different prompts may have the same.
    """
    text = unicodedata.normalize("NFC", prompt.lower())
    name = "-".join("".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text).split())
    short = name[: limit + 1]
    while len(short) > limit or len(os.fsencode(short)) > BYTES:
        short = short.rpartition("-")[0] if "-" in short else short[:-1]
    return short or "video"


def file_stem(prompt: str) -> str:
    """Return a file name without suffix that no other prompt has: the slug, and a digest of the prompt unless the slug
    tells the whole prompt."""
    name = slug(prompt)
    if name.replace("-", " ") == prompt:
        return name
    return f"{name}_{hashlib.sha256(prompt.encode('utf-8', 'surrogatepass')).hexdigest()[:10]}"


def output_paths(
    output: str | Path | Sequence[str | Path] | None,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    one: bool,
) -> list[Path | None]:
    """Return where each video goes; None for those that are not written.

    A given file is overwritten. In a folder, names tell prompt and seed, so that videos of other prompts or seeds do
    not take each other's file.

    Args:
        output: a file (with a suffix, for `one` video), a directory, or one path each.
        prompts, seeds: of the videos.
        one: whether a single video was asked for, not a list of one.

    Raises:
        InputError: a list of paths of the wrong length, or the same file twice.
        OutputError: a path cannot be written.
    """
    if output is None:
        return [None] * len(prompts)
    if isinstance(output, (str, Path)):
        paths = _of_one_path(Path(output), prompts, seeds, one=one)
    elif isinstance(output, (list, tuple)) and all(isinstance(p, (str, Path)) for p in output):
        paths = [Path(p) for p in output]
    else:
        raise InputError(f"output_path={output!r} is neither a path nor a list of paths")
    if len(paths) != len(prompts):
        raise InputError(f"{len(prompts)} prompts but {len(paths)} output paths")
    for path in paths:
        check_output(path)
    if len({os.path.normpath(path.absolute()) for path in paths}) != len(paths):
        raise InputError("two videos would be written to the same file")
    return list(paths)


def _of_one_path(output: Path, prompts: Sequence[str], seeds: Sequence[int], *, one: bool) -> list[Path]:
    """Return the paths for one given path, a file or a folder."""
    folder = not output.suffix or (output.suffix.lower() not in SUFFIXES and _is_dir(output))
    if one and not folder:
        return [output]
    if not folder and not _is_dir(output):
        raise InputError(f"output {output} is one file for {len(prompts)} videos; give a directory")
    names = [f"{file_stem(p)}-{s}" for p, s in zip(prompts, seeds, strict=True)]
    if not one:
        names = [f"{i:0{len(str(len(prompts) - 1))}d}-{n}" for i, n in enumerate(names)]
    return [output / f"{n}.mp4" for n in names]


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name that no file can have; it is refused where it is checked
        return False
