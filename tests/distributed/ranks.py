"""Runs a function as several processes that form a layout; forked, so that a test costs no imports.

Every process has one thread, as both arms of a comparison must.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from forks import show_stacks
from kinetoscope.parallel import Groups, ParallelConfig
from kinetoscope.parallel.groups import join

SECONDS = 120


def run_ranks(
    parallel: str | ParallelConfig, work: Callable[..., Any], *arguments: Any, seconds: float = SECONDS
) -> list[Any]:
    """[work(groups, *arguments) of rank 0, of rank 1, ...]; tensors and other picklable values come back.

    Raises AssertionError with the traceback of the first rank that failed, or naming those that did not end in time.
    """
    config = ParallelConfig.of(parallel)
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(config.world)]
        processes = [
            context.Process(target=_rank, args=(config, rank, folder, pipe[1], work, arguments), daemon=True)
            for rank, pipe in enumerate(pipes)
        ]
        for process, (_, sender) in zip(processes, pipes, strict=True):
            process.start()
            sender.close()
        results: list[Any] = []
        try:
            for rank, (receiver, _) in enumerate(pipes):
                if not receiver.poll(seconds):
                    show_stacks()
                    raise AssertionError(
                        f"rank {rank} of {config} did not end within {seconds} s; stderr has the stacks of all ranks"
                    )
                try:
                    ok, value = receiver.recv()
                except EOFError:
                    raise AssertionError(f"rank {rank} of {config} died") from None
                assert ok, f"rank {rank} of {config}:\n{value}"
                results.append(value)
        finally:
            for process in processes:
                if len(results) < config.world:
                    process.kill()
                process.join()
    return results


def _rank(
    config: ParallelConfig, rank: int, folder: str, sender: Any, work: Callable[..., Any], arguments: Any
) -> None:
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(str(Path(folder) / "store"), config.world)
        groups: Groups = join(config, rank=rank, store=store, device=torch.device("cpu"), timeout=SECONDS)
        result = (True, work(groups, *arguments))
    except BaseException:
        result = (False, traceback.format_exc())
    # Tensors go by value: shared memory would outlive neither the child nor the sandbox's limits.
    sender.send(_plain(result))
    if result[0] and dist.is_initialized():  # the work may have parted from the others itself
        dist.barrier()
    os._exit(0)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone().numpy() if value.dtype != torch.bfloat16 else value.float().numpy()
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_plain(v) for v in value)
    return value
