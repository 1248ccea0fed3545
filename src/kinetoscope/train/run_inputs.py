"""Digests of what a run is trained from, so that a resume on other data or other base weights is refused.

The recipe names its inputs by path or name, and what lies there may be replaced between two starts. So the first start
records digests, and each resume compares. What is only a matter of rounding (devices, threads, versions) is recorded
too, and told when it has changed.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kinetoscope.core.errors import ConfigError
from kinetoscope.core.files import write_text
from kinetoscope.core.version import __version__
from kinetoscope.loading.directory import file_digest

SAMPLED_BYTES, PIECE = 16 << 20, 64 << 10
"""Of a larger file of data, so many bytes are read, in pieces of a size."""
OLD_RUN = (
    "%s: this run was begun by a version that recorded no digests of its inputs; its data and base models are taken to "
    "be those that it was trained from"
)

logger = logging.getLogger("kinetoscope.train")


def text_digest(*texts: str) -> str:
    """Return the SHA-256 (hex) of texts."""
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogateescape")).hexdigest()


def sampled_digest(file: Path) -> str:
    """Return a SHA-256 (hex) of the size of a file and of its contents: all of them, or of a file above
    `SAMPLED_BYTES` evenly spread pieces, its beginning and its end among them.

    Data that are made anew differ everywhere, so the pieces tell them apart, for 16 MB of reading.
    """
    size = file.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        if size <= SAMPLED_BYTES:
            while chunk := stream.read(1 << 22):
                found.update(chunk)
        else:
            pieces = SAMPLED_BYTES // PIECE
            for number in range(pieces):
                stream.seek((size - PIECE) * number // (pieces - 1))
                found.update(stream.read(PIECE))
    return found.hexdigest()


@dataclass(slots=True)
class FileDigests:
    """SHA-256 of whole files, of which each is read once while its size and its time of change stay.

    Attributes:
        known: resolved path -> [size, time in ns, digest], as an earlier start recorded them.
        used: likewise, of this start.
    """

    known: Mapping[str, list[Any]] = field(default_factory=dict[str, list[Any]])
    used: dict[str, list[Any]] = field(default_factory=dict[str, list[Any]])

    def of(self, file: Path) -> str:
        """Return the digest of a file. Large files of the hub's cache bear it as their name, and are not read."""
        stat, key = file.stat(), str(file.resolve())
        before = self.known.get(key)
        if before is None or before[:2] != [stat.st_size, stat.st_mtime_ns]:
            before = [stat.st_size, stat.st_mtime_ns, file_digest(file)]
        self.used[key] = before
        return before[2]

    def of_folder(self, folder: Path) -> str:
        """Return one digest of the names and contents of all files of a folder; of a file, its own."""
        if not folder.is_dir():
            return self.of(folder)
        files = sorted(f for f in folder.rglob("*") if f.is_file())
        return text_digest(*(f"{f.relative_to(folder).as_posix()} {self.of(f)}" for f in files))


@dataclass(frozen=True, slots=True)
class RunInputs:
    """What a run is trained from.

    Attributes:
        digests: input -> digest; the name says what it is in words of the recipe ("models.student transformer").
        environment: what else the bits of a run depend on, by name.
        files: see `FileDigests`.
        recorded: False: nothing was recorded.
    """

    digests: Mapping[str, str]
    environment: Mapping[str, str]
    files: FileDigests
    recorded: bool = True

    @staticmethod
    def read(file: Path) -> RunInputs:
        """Return what an earlier start recorded.

        Raises:
            ConfigError: the file is damaged.
        """
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            return RunInputs(values["digests"], values["environment"], FileDigests(values["files"]))
        except FileNotFoundError:
            return RunInputs({}, {}, FileDigests(), recorded=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{file} cannot be read ({error}); delete it to continue without a check of the inputs"
            ) from error

    def write(self, file: Path) -> None:
        """Record it.

        Raises:
            OutputError: the file cannot be written.
        """
        values = {"digests": self.digests, "environment": self.environment, "files": self.files.used}
        write_text(file, json.dumps(values, indent=1))

    def check(self, found: RunInputs, root: Path) -> None:
        """Compare this record with what is there now; what only one of the two names is not compared.

        Raises:
            ConfigError: an input is another one; the message names it.
        """
        if not self.recorded:
            logger.warning(OLD_RUN, root)
            return
        changed = [k for k in self.digests if found.digests.get(k, self.digests[k]) != self.digests[k]]
        if changed:
            raise ConfigError(
                f"output={root}: changed since this run began: {', '.join(changed)}; put back what it was "
                "trained from, or set output=FOLDER to start another run"
            )
        others = {k: (v, found.environment[k]) for k, v in self.environment.items() if k in found.environment}
        told = [f"{k}={now} (was {before})" for k, (before, now) in others.items() if now != before]
        if told:
            logger.warning("%s goes on, but not to the same bits: %s", root, ", ".join(told))


def environment(**more: object) -> dict[str, str]:
    """Return what the bits of a run depend on beside its inputs: versions, the CPU's kernels, and `more`."""
    facts = {"kinetoscope": __version__, "torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
    return {k: str(v) for k, v in {**facts, **more}.items()}
