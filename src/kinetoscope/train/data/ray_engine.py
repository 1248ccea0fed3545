"""The missing shards of a job by Ray Data: actors anywhere on a cluster whose machines share the folders."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ray import data
from ray.exceptions import RayError

from kinetoscope.core.errors import KinetoscopeError, WorkerError
from kinetoscope.parallel.ray_cluster import enter_cluster, leave_cluster, reason
from kinetoscope.train.data.preprocess import Job, Worker
from kinetoscope.train.data.sources import Item


class ShardMaker:
    """A `Worker` as Ray Data calls it: once a row {"shard": its number, "items": pickled}."""

    def __init__(self, job: Job) -> None:
        self._worker = Worker(job)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """{"made": pickled}: the number of items of the shard when it is written, or the error that it ended with;
        raised, it would come back as text."""
        try:
            made = self._worker.make(int(row["shard"]), pickle.loads(row["items"]))
        except KinetoscopeError as error:
            made = error
        return {"made": pickle.dumps(made)}


def make_on_ray(
    job: Job, parts: Sequence[Sequence[Item]], missing: Sequence[int], workers: int, address: str | None
) -> Iterator[int]:
    """Make the missing shards; yields the number of items of each as it is finished.

    Args:
        job: its `threads` are said.
        workers: actors; on CUDA each has a GPU of its own.
        address: of a cluster; None starts one on this machine for the job, unless this program has one.

    Raises:
        ConfigError: the cluster cannot be joined.
        WorkerError: an actor died or failed in another way than a `Worker` does.
        KinetoscopeError: what a `Worker` raises.
    """
    if not missing:
        return
    threads = job.threads or 1
    on_gpu = job.devices[0].startswith("cuda")
    if on_gpu:  # the only one that Ray lets an actor see
        job = replace(job, devices=("cuda:0",))
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    data.DataContext.get_current().enable_progress_bars = False
    enter_cluster(address, workers * threads)
    try:
        rows: Any = data.from_items(
            [{"shard": n, "items": pickle.dumps(parts[n])} for n in missing], override_num_blocks=len(missing)
        )
        pool = data.ActorPoolStrategy(min_size=1, max_size=min(workers, len(missing)))
        made = rows.map(ShardMaker, fn_constructor_args=(job,), compute=pool, num_cpus=threads, num_gpus=int(on_gpu))
        for row in made.iter_rows():
            outcome: int | KinetoscopeError = pickle.loads(row["made"])
            if isinstance(outcome, KinetoscopeError):
                raise outcome
            yield outcome
    except RayError as error:
        raise WorkerError(
            f"Ray could not make the shards: {reason(error)}; what is done stays: run the same again"
        ) from error
    finally:
        leave_cluster()
