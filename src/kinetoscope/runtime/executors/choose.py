"""Which executor a generator gets, by what was asked for and how the process was started."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from kinetoscope.core.config import launch
from kinetoscope.core.errors import CompositionError, ConfigError
from kinetoscope.core.extensions import named_extensions
from kinetoscope.loading import ModelDir
from kinetoscope.parallel import ParallelConfig
from kinetoscope.runtime.auto import auto_layout, is_auto
from kinetoscope.runtime.executors.base import POOLS, Executor, ExecutorSpec
from kinetoscope.runtime.executors.orders import Setup
from kinetoscope.runtime.parallel import check_devices

Parallel = ParallelConfig | Mapping[str, Any] | str


def of_one(config: ParallelConfig) -> dict[str, Any] | None:
    """The layout of one video as its record keeps it: how many are made at once does not change it."""
    return {k: v for k, v in config.as_dict().items() if k != "replicas"} or None


def choose_executor(executor: str | None, config: ParallelConfig) -> ExecutorSpec:
    """What carries out the requests of a layout; None chooses.

    Raises:
        InputError: an unknown executor, or a bad setting of it.
        ConfigError: one that cannot carry the layout, or Ray is not installed.
    """
    if executor is None:
        if config.world == 1:
            return ExecutorSpec("in-process")
        return ExecutorSpec("processes" if launch() is None else "torchrun")
    spec = ExecutorSpec.of(executor)
    if spec.name == "in-process" and config.world > 1:
        raise ConfigError(
            f"parallel {config} and executor='in-process' cannot be used together: one process has one device; use "
            "'processes', 'ray' or 'torchrun'"
        )
    if spec.name == "ray" and find_spec("ray") is None:
        raise ConfigError("executor='ray' needs Ray; install it with: pip install 'kinetoscope[ray]'")
    return spec


def check_pool(
    executor: str, hooks: Sequence[Any], modules: Mapping[str, Any] | None, changes: Sequence[str] = ()
) -> None:
    """Refuse what other processes cannot have.

    Args:
        executor: name of the executor.
        hooks, modules: given when the model is opened, or with a request.
        changes: what the program changed on the pipeline of this process (`ComposedPipeline.changes`).

    Raises:
        CompositionError: names both.
    """
    for name, given in (("hooks", hooks), ("modules", modules)):
        if given:
            raise CompositionError(
                f"{name}= and executor={executor!r} cannot be used together: the model runs in other processes, which "
                "do not have the objects of this one"
            )
    if changes:
        raise CompositionError(
            f"{', '.join(changes)} and executor={executor!r} cannot be used together: the model runs in other "
            "processes, which opened it without what this program changed; use executor='in-process' or 'torchrun', or "
            "put the change into a pipeline class of a module that they import (load_extensions, --import)"
        )


def open_pool(
    spec: ExecutorSpec,
    config: ParallelConfig,
    model: ModelDir,
    device: torch.device,
    dtype: torch.dtype,
    options: Mapping[str, Any],
    threads: int | None,
) -> Executor:
    """The processes of a layout, started.

    Args:
        device: a kind of device, or for a layout of one the very device.
        options: of `from_pretrained`, for each process.
        threads: of each process; None shares out those of this one.

    Raises:
        ConfigError: more devices than there are, or no cluster.
        WorkerError: the processes cannot start.
        KinetoscopeError: what opening the model refuses.
    """
    assert spec.name in POOLS
    if device.index is not None and config.world > 1:
        raise ConfigError(f"device={str(device)!r} and parallel {config} cannot be used together: give 'cuda'")
    own = threads or max(1, torch.get_num_threads() // config.world)

    level = logging.getLogger("kinetoscope").getEffectiveLevel()

    def setup(replica: int, rank: int, store: str | tuple[str, int]) -> Setup:
        place = device
        if device.type == "cuda" and device.index is None:
            place = torch.device("cuda", replica * config.ranks + rank if spec.name == "processes" else 0)
        return Setup(
            rank, replica_config, model, place, dtype, options, store, spec.timeout, spec.stall, own, level,
            named_extensions(),
        )  # fmt: skip

    replica_config = ParallelConfig.of(of_one(config))
    if spec.name == "ray":
        from kinetoscope.runtime.executors.on_ray import RayExecutor

        return RayExecutor(config, model, spec, setup, device)
    from kinetoscope.runtime.executors.processes import MultiProcExecutor

    check_devices(config, device)
    return MultiProcExecutor(config, model, spec, setup)


def resolve_layout(
    parallel: Parallel | None,
    model: ModelDir,
    device: str | torch.device,
    dtype: str | torch.dtype,
    options: Mapping[str, Any],
) -> ParallelConfig:
    """The layout that was asked for, or that `runtime.auto` chooses.

    Raises:
        ConfigError: an unknown degree, or one that is no positive number; or no layout fits.
    """
    if isinstance(parallel, str) and is_auto(parallel):
        return auto_layout(parallel, model, device, dtype, options)
    return ParallelConfig.of(parallel)
