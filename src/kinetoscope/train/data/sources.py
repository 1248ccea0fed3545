"""Where clips and captions come from: folders, JSONL, CSV, webdataset tars, worlds. A source is a fixed list of items.

Listing opens no video. What files hold is read where the item is encoded, so a bad one costs its own row only.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from kinetoscope.core.errors import InputError, shown
from kinetoscope.core.files import name_problem, path_exists
from kinetoscope.worlds import get_world

Kind = Literal["auto", "folder", "jsonl", "csv", "tar", "world"]
KINDS: tuple[Kind, ...] = ("auto", "folder", "jsonl", "csv", "tar", "world")
SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".gif")
VIDEO_NAMES = ("video", "path", "file", "file_name", "video_path")
CAPTION_NAMES = ("caption", "text", "prompt")
WORLD = "world:"
MAX_CLIPS = 10_000_000
"""Clips of a world, whose list is in memory."""
KEPT, NO_TEXT = "surrogateescape", "it is not text in UTF-8"
"""How a list is read, so that bytes which are no text cost their own line only; and what is said of that line."""


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes somewhere: a file, or part of one.

    Attributes:
        offset, size: of the part; None: all of the file.
    """

    path: str
    offset: int | None = None
    size: int | None = None

    def open(self) -> BinaryIO:
        """The bytes as a file."""
        if self.offset is None:
            return Path(self.path).open("rb")
        with Path(self.path).open("rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.size))


@dataclass(frozen=True, slots=True)
class Item:
    """One clip with its caption.

    Attributes:
        key: names it in its source; no two items have the same.
        video: where the clip is; None: it is drawn by a world, `seed` is its number.
        caption: the caption, or where it is; None: there is none.
        problem: why it cannot be used, if that is known already.
    """

    key: str
    video: Place | None = None
    caption: str | Place | None = None
    seed: int = 0
    problem: str = ""

    def read_caption(self) -> str:
        """The caption; empty if there is none.

        Raises:
            InputError: it cannot be read.
        """
        if self.caption is None or isinstance(self.caption, str):
            return self.caption or ""
        try:
            with self.caption.open() as file:
                return file.read().decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"the caption cannot be read: {error}") from error


@dataclass(frozen=True)
class Source:
    """A list of items in a fixed order.

    Attributes:
        kind: "folder", "jsonl", "csv", "tar", or "world:NAME".
        items: all of them.
        digest: SHA-256 over names, places, sizes and captions, by which a changed source is noticed.
    """

    kind: str
    items: tuple[Item, ...]
    digest: str

    @property
    def world(self) -> str | None:
        """Name of the world, if it is one."""
        return self.kind.removeprefix(WORLD) if self.kind.startswith(WORLD) else None


def open_source(source: str, kind: Kind = "auto", *, clips: int | None = None) -> Source:
    """The items of a source.

    Args:
        source: a folder of clips with .txt files of the same names; a .jsonl or .csv file with a video and a caption a
            row (paths are relative to the file); a .tar file, or a folder of them, in webdataset's layout; or
            "world:NAME".
        kind: which of these; "auto" tells by the name.
        clips: how many, of a world.

    Raises:
        InputError: there is no such source, it cannot be read, or it holds nothing.
    """
    path = Path(source)
    if why := name_problem(path):
        raise InputError(f"source {shown(source)}: {why}")
    if kind == "auto":
        kind = _guess(source, path)
    if kind == "world":
        return _world(source, clips)
    if clips is not None:
        raise InputError(f"a number of clips is for worlds; {source} has as many as it has")
    if not path_exists(path):
        raise InputError(f"source {shown(source)} does not exist")
    read = {"folder": _folder, "jsonl": _jsonl, "csv": _csv, "tar": _tars}[kind]
    try:
        items = tuple(read(path))
    except (OSError, UnicodeDecodeError, tarfile.TarError, csv.Error) as error:
        raise InputError(f"source {source} cannot be read as {kind}: {error}") from error
    if not items:
        raise InputError(f"source {source} holds no clips; as {kind} it should hold {_EXPECTED[kind]}")
    return Source(kind, items, _digest(items))


_EXPECTED = {
    "folder": f"files {', '.join(SUFFIXES)} with .txt files of the same names",
    "jsonl": "an object a line",
    "csv": "rows under a header",
    "tar": "a clip and a .txt or .json member under one name",
}


def _guess(source: str, path: Path) -> Kind:
    if source.startswith(WORLD):
        return "world"
    if path.is_dir():
        inside = [p.suffix for p in path.iterdir() if p.is_file()]
        return "tar" if ".tar" in inside and not set(inside) & set(SUFFIXES) else "folder"
    known: dict[str, Kind] = {".jsonl": "jsonl", ".csv": "csv", ".tar": "tar"}
    if path.suffix.lower() not in known:
        raise InputError(f"source {source}: give a folder, a {', '.join(known)} file, or world:NAME")
    return known[path.suffix.lower()]


def _world(source: str, clips: int | None) -> Source:
    world = get_world(source.removeprefix(WORLD))
    if clips is None or not 1 <= clips <= MAX_CLIPS:
        raise InputError(f"{source} has clips without end; say how many (clips), 1 to {MAX_CLIPS}")
    items = tuple(Item(f"{i:09d}", seed=i) for i in range(clips))
    return Source(WORLD + world.name, items, _digest(items))


def _folder(path: Path) -> Iterator[Item]:
    for file in sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and not p.is_dir()):
        text = file.with_suffix(".txt")
        caption = Place(str(text)) if text.is_file() else None
        yield Item(file.relative_to(path).as_posix(), Place(str(file)), caption)


def _jsonl(path: Path) -> Iterator[Item]:
    with path.open(encoding="utf-8-sig", errors=KEPT) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            if not _is_text(line):
                yield Item(f"line {number}", problem=NO_TEXT)
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                yield Item(f"line {number}", problem=f"the line is not JSON: {error}")
                continue
            if isinstance(row, dict):
                yield _row(path, f"line {number}", row)
            else:
                yield Item(f"line {number}", problem=f"the line holds no object but a {type(row).__name__}")


def _csv(path: Path) -> Iterator[Item]:
    with path.open(encoding="utf-8-sig", errors=KEPT, newline="") as lines:
        rows = csv.reader(lines)
        header = next(rows, [])
        if not set(header) & set(VIDEO_NAMES):
            told = f"the header {', '.join(header)}" if header else "it"
            raise csv.Error(f"{told} has no column {' or '.join(VIDEO_NAMES)}")
        for number, fields in enumerate((row for row in rows if row), 1):
            if not _is_text("".join(fields)):
                yield Item(f"row {number}", problem=NO_TEXT)
            elif len(fields) > len(header):  # as a rule a comma of a caption, which would lose its end
                problem = f"it has {len(fields)} fields under a header of {len(header)}; quote text that holds commas"
                yield Item(f"row {number}", problem=problem)
            else:
                yield _row(path, f"row {number}", dict(zip(header, fields, strict=False)))


def _is_text(line: str) -> bool:
    """Whether all of a line that was read with `KEPT` is UTF-8."""
    return not any("\udc80" <= c <= "\udcff" for c in line)


def _row(path: Path, where: str, row: dict[str, Any]) -> Item:
    """A row's item: named by its place and its video, since a video may be listed more than once."""
    name = next((row[n] for n in VIDEO_NAMES if row.get(n)), None)
    if not isinstance(name, str):
        return Item(where, problem=f"names no video; one of {', '.join(VIDEO_NAMES)} should")
    caption = next((row[n] for n in CAPTION_NAMES if row.get(n) is not None), None)
    key = f"{where}: {name}"
    if caption is not None and not isinstance(caption, str):
        return Item(key, problem=f"its caption is no text but a {type(caption).__name__}")
    return Item(key, Place(str(path.parent / name)), caption)


def _tars(path: Path) -> Iterator[Item]:
    for file in sorted(path.glob("*.tar")) if path.is_dir() else [path]:
        yield from _tar(file, f"{file.name}/" if path.is_dir() else "")


def _tar(path: Path, prefix: str) -> Iterator[Item]:
    """Members whose names agree up to the first dot of the last part are one sample (webdataset's rule)."""
    samples: dict[str, dict[str, Place]] = {}
    broken = ""
    try:
        with tarfile.open(path, "r:") as archive:  # not compressed: parts are read in any order
            for member in archive:
                if member.isfile():
                    folder, slash, name = member.name.rpartition("/")
                    stem, _, suffix = name.partition(".")
                    place = Place(str(path), member.offset_data, member.size)
                    samples.setdefault(folder + slash + stem, {})["." + suffix.lower()] = place
    except tarfile.TarError as error:
        broken = f"the archive is damaged after this ({error})"
        if not samples:
            broken = f"it is no archive, a damaged or a compressed one ({error})"
            if not prefix:
                raise tarfile.ReadError(broken) from error
    size = path.stat().st_size
    for stem, parts in sorted(samples.items()):
        video = next((suffix for suffix in SUFFIXES if suffix in parts), None)
        if video is None:
            yield Item(f"{prefix}{stem}", problem=f"no clip is under this name, but {', '.join(sorted(parts))}")
            continue
        place = parts[video]
        cut = any((p.offset or 0) + (p.size or 0) > size for p in parts.values())
        problem = "the archive ends within this sample" if cut else ""
        if ".txt" in parts or ".json" not in parts:
            yield Item(f"{prefix}{stem}{video}", place, parts.get(".txt"), problem=problem)
            continue
        caption, wrong = _json_caption(parts[".json"])
        yield Item(f"{prefix}{stem}{video}", place, caption, problem=problem or wrong)
    if broken:
        yield Item(f"{prefix or path.name}", problem=broken)


def _json_caption(place: Place) -> tuple[str | None, str]:
    """(caption, what is wrong) of a sample's .json member."""
    try:
        with place.open() as file:
            row = json.load(file)
    except ValueError as error:
        return None, f"its .json member is not JSON: {error}"
    caption = next((row[n] for n in CAPTION_NAMES if row.get(n) is not None), None) if isinstance(row, dict) else None
    return (caption, "") if caption is None or isinstance(caption, str) else (None, "its caption is no text")


def _digest(items: Sequence[Item]) -> str:
    """SHA-256 (hex) of the list; of files their sizes and times stand for what they hold."""
    total = hashlib.sha256()
    for item in items:
        parts = [item.key, str(item.seed), item.problem, _stamp(item.video), _stamp(item.caption)]
        total.update(json.dumps(parts).encode())
    return total.hexdigest()


def _stamp(place: Place | str | None) -> str:
    """What tells that a file or a caption is another one now."""
    if place is None or isinstance(place, str):
        return place or ""
    try:
        stat = Path(place.path).stat()
    except OSError:
        return "missing"
    return f"{place.offset} {place.size} {stat.st_size} {stat.st_mtime_ns}"
