"""The data set on disk: Parquet shards of one row a clip, and what says how they were made.

    dataset.json      how rows are made: format version, model and hashes of its encoders, settings, source
    part-00000.parquet, part-00001.parquet, ...
    index.json        written last: the bucket of every row of every shard
    rejected.jsonl    clips that gave no row, each with the reason

A shard is the whole outcome of its items, rows and rejections alike, under one name that appears at once: there is no
other state, so a run can be killed at any moment. A row is a row group, so that any one can be read by itself.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinetoscope.core.errors import ConfigError, InputError
from kinetoscope.core.files import replacing, write_text
from kinetoscope.train.data.buckets import Bucket
from kinetoscope.train.data.clips import Window
from kinetoscope.train.data.encoding import Identity

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as error:  # an extra: most people only sample
    raise ConfigError("data sets need pyarrow, which is not installed; pip install 'kinetoscope[data]'") from error

FORMAT, VERSION = "kinetoscope-latents", 1
DATASET, INDEX, REJECTED = "dataset.json", "index.json", "rejected.jsonl"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("window", pa.int32(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("latents", pa.binary(), nullable=False),
        pa.field("latents_shape", pa.list_(pa.int32(), 4), nullable=False),
        pa.field("text_states", pa.binary(), nullable=False),
        pa.field("text_shape", pa.list_(pa.int32(), 2), nullable=False),
        pa.field("num_frames", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("fps", pa.float64(), nullable=False),
        pa.field("duration", pa.float64(), nullable=False),
        pa.field("start", pa.float64(), nullable=False),
        pa.field("source_height", pa.int32(), nullable=False),
        pa.field("source_width", pa.int32(), nullable=False),
        pa.field("source_fps", pa.float64(), nullable=False),
    ]
)
"""Columns; docs/data.md says what each holds."""


@dataclass(frozen=True)
class Manifest:
    """How the rows of a data set are made (`dataset.json`).

    Attributes:
        identity: of the encoders.
        fingerprint: SHA-256 over the whole model, transformer included; for the record.
        text_tokens: length that the model's text is padded to.
        dtype: of stored latents and text states.
        settings: how clips were cut.
        source: kind and number of items, and the digest of their list.
        shards: how many there are when all is done.
    """

    identity: Identity
    fingerprint: str
    text_tokens: int
    dtype: str
    settings: dict[str, Any]
    source: dict[str, Any]
    shards: int

    def dump(self) -> str:
        """As JSON text."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1, sort_keys=True)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """That of a data set.

        Raises:
            InputError: the folder holds none, or one of another version.
        """
        values = _read_json(folder / DATASET)
        if values.pop("format", None) != FORMAT:
            raise InputError(f"{folder} holds no data set of `kinetoscope preprocess`")
        if (version := values.pop("version", None)) != VERSION:
            raise InputError(f"{folder} is a data set of version {version}; this program reads {VERSION}: make it anew")
        try:
            return cls(**{**values, "identity": Identity(**values["identity"])})
        except (KeyError, TypeError) as error:
            raise InputError(f"{folder / DATASET} is damaged ({error}); make the data set anew") from error


@dataclass(frozen=True, eq=False)
class Row:
    """One clip.

    Attributes:
        latents: [C, t, h, w].
        text: [n, D].
    """

    key: str
    window: Window
    fps: float
    latents: Tensor
    text: Tensor

    @property
    def bucket(self) -> Bucket:
        """The shape of its clip."""
        return Bucket(*self.window.frames.shape[:3])

    def columns(self, dtype: str) -> dict[str, Any]:
        """The row as `SCHEMA` has it.

        Raises:
            InputError: latents or text states are not finite, or not in this dtype.
        """
        shown, w = self.bucket, self.window
        return {
            "key": self.key, "window": w.index, "caption": w.caption,
            "latents": _as_bytes(self.latents, dtype, "its latents"), "latents_shape": list(self.latents.shape),
            "text_states": _as_bytes(self.text, dtype, "its text states"), "text_shape": list(self.text.shape),
            "num_frames": shown.frames, "height": shown.height, "width": shown.width,
            "fps": self.fps, "duration": shown.frames / self.fps, "start": w.start,
            "source_height": w.source_height, "source_width": w.source_width, "source_fps": w.source_fps,
        }  # fmt: skip


def _as_bytes(values: Tensor, dtype: str, what: str) -> bytes:
    stored = values.to(DTYPES[dtype]).contiguous()
    if not torch.isfinite(stored).all():
        raise InputError(f"{what} hold values that are not finite as {dtype}")
    return stored.view(torch.uint8).numpy().tobytes()


def as_tensor(data: bytes, shape: Sequence[int], dtype: str) -> Tensor:
    """Stored bytes as float32 values of `shape`."""
    return torch.frombuffer(bytearray(data), dtype=DTYPES[dtype]).view(*shape).float()


# -- writing ----------------------------------------------------------------------------------------------------------


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard is."""
    return folder / f"part-{number:05d}.parquet"


def write_shard(path: Path, rows: Iterable[dict[str, Any]], rejected: Sequence[dict[str, str]], made: str) -> None:
    """Write what became of a shard's items.

    Args:
        rows: of `Row.columns`; taken one by one, and written as they come.
        rejected: "key" and "reason" each; may grow while rows are taken.
        made: the manifest's text.

    Raises:
        OutputError: it cannot be written, or its folder was removed.
    """
    buckets: list[list[int]] = []
    content = hashlib.sha256()
    options: dict[str, Any] = {
        "compression": "none", "use_dictionary": False, "write_statistics": False, "write_page_checksum": True,
    }  # fmt: skip
    with (
        replacing(path, make_folder=False) as temporary,
        temporary.open("wb") as file,
        pq.ParquetWriter(file, SCHEMA, **options) as writer,
    ):
        for row in rows:
            writer.write_table(pa.Table.from_pylist([row], SCHEMA))
            buckets.append([row["num_frames"], row["height"], row["width"]])
            for name in SCHEMA.names:
                content.update(row[name] if isinstance(row[name], bytes) else f"\0{row[name]}\0".encode())
        facts = {"dataset": made, "buckets": json.dumps(buckets), "rejected": json.dumps(list(rejected))}
        facts["content"] = content.hexdigest()
        writer.add_key_value_metadata({f"kinetoscope.{name}": text for name, text in facts.items()})


# -- reading ----------------------------------------------------------------------------------------------------------


_DAMAGE = (OSError, pa.ArrowException, KeyError, ValueError, TypeError)
"""What reading a damaged file may end in; pages have checksums."""
_AGAIN = "delete it if it is there, and run the same `preprocess` command again: it makes what is missing"


class Shard:
    """A shard that is open for reading.

    Attributes:
        buckets: shape of each row.
        rejected: clips that gave no row.
        content: SHA-256 of the values of all rows, as they were written; empty in shards of earlier versions.

    Raises:
        InputError: it is missing or damaged, or belongs to another data set.
    """

    def __init__(self, path: Path, made: str) -> None:
        self.path = path
        try:
            self._file = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
            facts = self._file.metadata.metadata or {}
            if facts.get(b"kinetoscope.dataset") != made.encode():
                raise InputError(f"{path} is not of the data set that {DATASET} beside it describes; delete it")
            self.buckets = [Bucket(*b) for b in json.loads(facts[b"kinetoscope.buckets"])]
            self.rejected: list[dict[str, str]] = json.loads(facts[b"kinetoscope.rejected"])
            self.content = facts.get(b"kinetoscope.content", b"").decode()
            if not self._file.schema_arrow.equals(SCHEMA):
                raise ValueError("its columns are others")
        except _DAMAGE as error:
            raise InputError(f"{path} cannot be read ({error}); {_AGAIN}") from error

    def row(self, number: int) -> dict[str, Any]:
        """The columns of one row."""
        try:
            return self._file.read_row_group(number).to_pylist()[0]
        except _DAMAGE as error:
            raise InputError(f"{self.path} is damaged ({error}); {_AGAIN}") from error


class DataSet:
    """A finished data set.

    Attributes:
        manifest: how it was made.
        buckets: all shapes that there are, in order.
        rows: shard -> for each of its rows the place of its shape in `buckets`.

    Raises:
        InputError: the folder holds none, or it is not finished.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        if not (self.folder / INDEX).is_file():
            raise InputError(f"data set {folder} is not finished; run the same `preprocess` command to finish it")
        index = _read_json(self.folder / INDEX)
        self._content: list[str] = index.get("content", [])
        self.buckets = [Bucket(*b) for b in index["buckets"]]
        self.rows: list[list[int]] = index["rows"]
        self._made = self.manifest.dump()
        self._open = lru_cache(maxsize=64)(self._open_shard)

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.rows)

    def digest(self) -> str:
        """Return a SHA-256 (hex) of the contents of the data set, without reading its rows.

        It is that of `dataset.json` and of `index.json`, which holds the digests of the rows that were taken when
        shards were written. Of a data set of an earlier version it is that of the sizes and footers of its shards.
        """
        found = hashlib.sha256(self._made.encode() + (self.folder / INDEX).read_bytes())
        if not self._content:
            for number in range(len(self.rows)):
                found.update(_footer(shard_path(self.folder, number)))
        return found.hexdigest()

    def _open_shard(self, number: int) -> Shard:
        shard = Shard(shard_path(self.folder, number), self._made)
        if self._content and shard.content != self._content[number]:
            raise InputError(f"{shard.path} holds other rows than {INDEX} beside it describes; {_AGAIN}")
        return shard

    def row(self, shard: int, number: int) -> dict[str, Any]:
        """The columns of one row, latents [C, t, h, w] and text states [n, D] as float32 tensors.

        Raises:
            InputError: the shard is missing or damaged.
        """
        found = self._open(shard).row(number)
        for name, shape in (("latents", "latents_shape"), ("text_states", "text_shape")):
            found[name] = as_tensor(found[name], found[shape], self.manifest.dtype)
        return found

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self.row(shard, number) for shard, rows in enumerate(self.rows) for number in range(len(rows)))

    def rejected(self) -> list[dict[str, str]]:
        """Clips that gave no row: "key" and "reason" each."""
        text = (self.folder / REJECTED).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]


def write_index(folder: Path, manifest: Manifest) -> tuple[int, list[dict[str, str]]]:
    """Finish a data set whose shards are all there; returns the number of rows, and the rejected clips.

    Raises:
        InputError: a shard is damaged.
        OutputError: the files cannot be written.
    """
    made = manifest.dump()
    shapes: list[list[Bucket]] = []
    rejected: list[dict[str, str]] = []
    content: list[str] = []
    for number in range(manifest.shards):
        shard = Shard(shard_path(folder, number), made)
        shapes.append(shard.buckets)
        content.append(shard.content)
        rejected += shard.rejected
    buckets = sorted({b for rows in shapes for b in rows})
    place = {b: i for i, b in enumerate(buckets)}
    index: dict[str, Any] = {
        "buckets": [[b.frames, b.height, b.width] for b in buckets],
        "rows": [[place[b] for b in rows] for rows in shapes],
    }
    if all(content):
        index["content"] = content
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rejected)
    write_text(folder / REJECTED, lines)
    write_text(folder / INDEX, json.dumps(index))
    return sum(map(len, shapes)), rejected


def _footer(path: Path) -> bytes:
    """Return the size of a Parquet file and its footer, which says where each row is and how long."""
    try:
        with path.open("rb") as file:
            size = file.seek(-8, os.SEEK_END) + 8
            length = int.from_bytes(file.read(4), "little")
            file.seek(max(0, size - 8 - length))
            return str(size).encode() + file.read(length)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}); {_AGAIN}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; `kinetoscope preprocess` makes data sets") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} should hold a JSON object")
    return values
