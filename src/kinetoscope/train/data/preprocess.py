"""From clips to a data set of latents: the job, cut into shards that any process can make, in any order.

What a shard holds depends on its items and the settings alone, never on who makes it or when. So a job that was killed
goes on with the shards that are missing, and several processes give what one gives.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from kinetoscope.core.errors import ConfigError, InputError, OutputError, WorkerError, shown
from kinetoscope.core.extensions import load_extensions, named_extensions
from kinetoscope.core.files import PART, name_problem, write_text
from kinetoscope.core.spec import one_of, parse_spec
from kinetoscope.loading import ModelDir
from kinetoscope.pipelines.catalogue import find_model
from kinetoscope.pipelines.preflight import fitting_defaults
from kinetoscope.train.data.buckets import Buckets, aspect_sizes
from kinetoscope.train.data.clips import Cut, iterate_windows
from kinetoscope.train.data.encoding import Encoder, Identity, open_encoders
from kinetoscope.train.data.sources import Item, Kind, Source, open_source
from kinetoscope.train.data.table import (
    DATASET,
    DTYPES,
    INDEX,
    Manifest,
    Row,
    shard_path,
    write_index,
    write_shard,
)

MOST = {"workers": 1024, "shard": 1_000_000, "threads": 1024}
Report = Callable[[int, int], None]
Engine = Callable[["Job", Sequence[Sequence[Item]], Sequence[int], int], Iterator[int]]
"""(job, items of each shard, shards to make, processes) -> number of items of each shard as it is finished."""


@dataclass(frozen=True)
class Summary:
    """What a job made.

    Attributes:
        folder: of the data set.
        clips: items of the source.
        rows: of the data set.
        rejected: clips that gave no row: "key" and "reason" each.
    """

    folder: Path
    clips: int
    rows: int
    rejected: list[dict[str, str]]


@dataclass(frozen=True)
class Job:
    """All that a process must know to make any shard.

    Attributes:
        model: whose encoders are used.
        cut: how clips become windows.
        folder: of the data set.
        made: the manifest's text.
        stored: dtype of latents and text states in the data set.
        devices: to compute on; process i takes number i of them, and begins again after the last.
        dtype: to compute in.
        threads: CPU threads of a process; None leaves them.
        extensions: modules that a process imports first.
    """

    model: ModelDir
    cut: Cut
    folder: Path
    made: str
    stored: str
    devices: tuple[str, ...]
    dtype: torch.dtype
    threads: int | None
    extensions: tuple[str, ...] = ()


class Worker:
    """Makes shards; the encoders are loaded with the first clip."""

    def __init__(self, job: Job, number: int = 0) -> None:
        self.job, self.device = job, job.devices[number % len(job.devices)]
        load_extensions(job.extensions)
        if job.threads is not None:
            torch.set_num_threads(job.threads)

    @cached_property
    def encoder(self) -> Encoder:
        """The model's."""
        return Encoder(open_encoders(self.job.model, self.device, self.job.dtype))

    def make(self, shard: int, items: Sequence[Item]) -> int:
        """Write a shard; returns the number of its items."""
        rejected: list[dict[str, str]] = []
        rows = (row for item in items for row in self._rows(item, rejected))
        write_shard(shard_path(self.job.folder, shard), rows, rejected, self.job.made)
        return len(items)

    def _rows(self, item: Item, rejected: list[dict[str, str]]) -> list[dict[str, Any]]:
        """All rows of an item or none."""
        try:
            rows: list[dict[str, Any]] = []
            text: Any = None
            for w in _windows(item, self.job.cut):  # encoded one by one: the frames of a long clip are never held
                text = self.encoder.text(w.caption) if text is None else text
                row = Row(item.key, w, self.job.cut.fps, self.encoder.latents(w.frames), text)
                rows.append(row.columns(self.job.stored))
            return rows
        except InputError as error:
            rejected.append({"key": item.key, "reason": " ".join(str(error).split())})
            return []


def _windows(item: Item, cut: Cut) -> Iterator[Any]:
    """Yield the windows of an item; see `iterate_windows`."""
    windows = iterate_windows(item, cut)
    try:
        yield from windows
    except (InputError, MemoryError):
        raise
    except Exception as error:  # whatever a decoder makes of a damaged file, it is that file's fault alone
        raise InputError(f"it cannot be read ({type(error).__name__}: {error})") from error


def preprocess(
    model: str | Path | ModelDir,
    source: str | Path,
    output: str | Path,
    *,
    kind: Kind = "auto",
    clips: int | None = None,
    split: str = "train",
    sizes: Sequence[tuple[int, int]] = (),
    aspects: Sequence[tuple[float, float]] = (),
    frames: Sequence[int] = (),
    fps: float | None = None,
    every_window: bool = False,
    upscale: bool = False,
    uncaptioned: bool = False,
    stored: str = "float32",
    shard: int = 32,
    workers: int = 1,
    threads: int | None = None,
    devices: Sequence[str] = ("cpu",),
    dtype: torch.dtype = torch.float32,
    engine: str = "processes",
    on_count: Report | None = None,
) -> Summary:
    """Make a data set, or finish one that an earlier call with the same settings began.

    Args:
        model: an embedded name, a directory, or a hub id; its VAE and text encoder are used.
        source, kind, clips: see `open_source`.
        output: folder of the data set.
        split: of a world's captions.
        sizes: (height, width) of the buckets; empty: the model's default.
        aspects: proportions (width, height): the sizes become those of about the area of the first one.
        frames: lengths of the buckets; empty: the model's default.
        fps: frames a second of the rows; None: the model's default.
        every_window: cut a long clip into as many rows as it gives; else its beginning is taken.
        upscale: take clips that are smaller than their bucket.
        uncaptioned: take clips that have no caption, with the empty one.
        stored: "float32", "bfloat16" or "float16", for latents and text states.
        shard: items a file.
        workers: processes.
        threads: CPU threads of each; None: shares of the cores. Latents agree to rounding across numbers of threads
            and bit for bit at one number.
        devices: to compute on, taken in turns by the processes.
        dtype: that the text encoder computes in; the VAE takes its own.
        engine: what runs the processes: "processes" (of this machine), "ray" (Ray Data on this machine), or
            "ray:address=auto" and the like (on a cluster whose machines share the folders). The shards are the same.
        on_count: called with (items done, items) when it begins and after each shard.

    Raises:
        InputError: the source cannot be read or holds nothing; sizes or frames that the model cannot have.
        ConfigError: the folder holds a data set that was made otherwise; an unknown setting; Ray is not installed, or
            its cluster cannot be joined.
        OutputError: a file cannot be written. What was finished stays; the same call goes on from there.
        WorkerError: a process died. What was finished stays, too.
    """
    if stored not in DTYPES:
        raise ConfigError(f"stored={stored!r} is unknown; use {', '.join(DTYPES)}")
    for name, value in (("workers", workers), ("shard", shard), ("threads", 1 if threads is None else threads)):
        if not 1 <= value <= MOST[name]:
            raise ConfigError(f"{name}={shown(value)} is outside [1, {MOST[name]}]")
    make = _engine(engine)
    if not isinstance(model, ModelDir):
        model = find_model(str(model))
    found = open_source(str(source), kind, clips=clips)
    cut = _cut(model, found, sizes, aspects, frames, fps, split, every_window, upscale, uncaptioned)
    parts = [found.items[i : i + shard] for i in range(0, len(found.items), shard)]
    manifest = Manifest(
        Identity.of(model), model.fingerprint(), open_encoders(model).text_tokens, stored, _settings(cut, shard),
        {"kind": found.kind, "items": len(found.items), "digest": found.digest}, len(parts),
    )  # fmt: skip
    folder = Path(output)
    if threads is None and (workers > 1 or make is not _here):
        threads = max(1, (os.cpu_count() or 1) // workers)
    job = Job(model, cut, folder, manifest.dump(), stored, tuple(devices), dtype, threads, named_extensions())
    with claimed(folder, manifest):
        missing = [n for n in range(len(parts)) if not shard_path(folder, n).exists()]
        done = len(found.items) - sum(len(parts[n]) for n in missing)
        if on_count:
            on_count(done, len(found.items))
        try:
            for count in make(job, parts, missing, workers):
                done += count
                if on_count:
                    on_count(done, len(found.items))
        except OutputError as error:
            raise OutputError(
                f"{error}; {done} of {len(found.items)} clips are done and stay: make room and run the same again"
            ) from error
        rows, rejected = write_index(folder, manifest)
    return Summary(folder, len(found.items), rows, rejected)


def _cut(
    model: ModelDir,
    source: Source,
    sizes: Sequence[tuple[int, int]],
    aspects: Sequence[tuple[float, float]],
    frames: Sequence[int],
    fps: float | None,
    split: str,
    every_window: bool,
    upscale: bool,
    uncaptioned: bool,
) -> Cut:
    pipeline = open_encoders(model)
    defaults, geometry = fitting_defaults(pipeline), pipeline.geometry
    assert defaults.height and defaults.width and defaults.num_frames and defaults.fps
    sizes = tuple(sizes) or ((defaults.height, defaults.width),)
    if aspects:
        sizes = aspect_sizes(sizes[0], aspects, geometry.spatial * geometry.patch[1])
    fps = defaults.fps if fps is None else fps
    if not 0 < fps <= 1000:
        raise InputError(f"fps={fps} is not a number of frames a second")
    buckets = Buckets(sizes, tuple(frames) or (defaults.num_frames,), geometry)
    return Cut(buckets, fps, every_window, upscale, uncaptioned, source.world, split)


def _settings(cut: Cut, shard: int) -> dict[str, Any]:
    """What the manifest tells of a cut."""
    return {
        "sizes": [list(s) for s in cut.buckets.sizes], "frames": cut.buckets.frames, "fps": cut.fps,
        "every_window": cut.every, "upscale": cut.upscale, "uncaptioned": cut.uncaptioned, "split": cut.split,
        "shard": shard,
    }  # fmt: skip


# -- one folder, one job ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def claimed(folder: Path, manifest: Manifest) -> Iterator[None]:
    """The folder of this job, which no other job writes to meanwhile.

    Raises:
        ConfigError: it holds another data set, or another process is at work in it.
        OutputError: it cannot be written.
    """
    if why := name_problem(folder):
        raise OutputError(f"{shown(str(folder))} cannot be written: {why}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system gives it back however this process ends
        except BlockingIOError as error:
            raise ConfigError(f"another process is making the data set {folder}; wait for it, or stop it") from error
        _agree(folder, manifest)
        for left in folder.glob(f".*{PART}"):  # of a process that was killed
            left.unlink()
        yield
    finally:
        os.close(handle)


def _agree(folder: Path, manifest: Manifest) -> None:
    """Refuse to mix two data sets in one folder; begin this one if there is none."""
    if not (folder / DATASET).exists():
        if (folder / INDEX).exists() or any(folder.glob("part-*.parquet")):
            raise ConfigError(f"{folder} holds parts of a data set without its {DATASET}; choose another folder")
        write_text(folder / DATASET, manifest.dump())
        return
    before = Manifest.read(folder)
    if before == manifest:
        return
    changed = [n for n in ("identity", "fingerprint", "dtype", "text_tokens") if _differ(n, before, manifest)]
    changed += [n for n, value in manifest.settings.items() if before.settings.get(n) != value]
    changed += [f"source {n}" for n, value in manifest.source.items() if before.source.get(n) != value]
    raise ConfigError(
        f"{folder} holds a data set that was made with another {', '.join(changed) or 'number of shards'}; choose "
        "another folder, or delete it to start over"
    )


def _differ(name: str, a: Manifest, b: Manifest) -> bool:
    mine: dict[str, Any] = vars(a)
    return mine[name] != vars(b)[name]


# -- processes --------------------------------------------------------------------------------------------------------


def _engine(spec: str) -> Engine:
    """What makes the shards.

    Raises:
        InputError: an unknown engine or setting of it.
        ConfigError: Ray Data is not installed.
    """
    name, values = parse_spec(spec, "engine")
    one_of(name, ("processes", "ray"), "engine")
    for key in values:
        one_of(key, ("address",) if name == "ray" else (), f"setting of engine {name}")
    if name == "processes":
        return _here
    try:
        from kinetoscope.train.data.ray_engine import make_on_ray
    except ImportError as error:
        raise ConfigError(f"engine=ray needs Ray Data ({error}); install it: pip install 'kinetoscope[ray]'") from error
    return partial(make_on_ray, address=values.get("address"))


def _here(job: Job, parts: Sequence[Sequence[Item]], missing: Sequence[int], workers: int) -> Iterator[int]:
    """Make the missing shards on this machine; yields the number of items of each as it is finished."""
    workers = min(workers, len(missing))
    if workers <= 1:
        worker = Worker(job)
        yield from (worker.make(n, parts[n]) for n in missing)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _begin, (job, context.Value("i", 0)))
    try:
        futures = [pool.submit(_make, n, parts[n]) for n in missing]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise WorkerError(
            f"a process that made shards of {job.folder} died, perhaps for want of memory; what is done stays: run the "
            "same again, with fewer workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker: Worker | None = None


def _begin(job: Job, counter: Any) -> None:
    """Set up a process of the pool."""
    global _worker
    with counter.get_lock():
        number = counter.value
        counter.value += 1
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = Worker(job, number)


def _end_with_parent() -> None:
    """A parent that is killed cannot tell its children; one that went on would write beside the next job's."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _make(shard: int, items: Sequence[Item]) -> int:
    assert _worker is not None
    return _worker.make(shard, items)
