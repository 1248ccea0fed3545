"""The processes of a layout, and who talks with whom."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import Store

from kinetoscope.core.config import Launch
from kinetoscope.core.errors import ConfigError
from kinetoscope.parallel.config import AXES, ParallelConfig

TIMEOUT = 600.0
"""Seconds that a process waits for the others before it gives up."""


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Processes that do one thing together.

    Attributes:
        name: of the axis, for messages and counters.
        size, index: how many they are, and which of them this is, in the order of ranks.
        ranks: of all of them.
        handle: of torch; None for a group of one, which never communicates.
    """

    name: str
    size: int
    index: int
    ranks: tuple[int, ...]
    handle: dist.ProcessGroup | None


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """This process's place in a layout.

    Attributes:
        config: the layout.
        rank: of this process.
        device: it computes on.
        mesh: all processes along `AXES`.
        replica, cfg, ring, ulysses, tp: the group along one axis.
        sequence: ring and ulysses together, ring outermost: who shares the tokens of a row.
        shard: cfg, ring and ulysses together: who would hold equal weights, which FSDP shares out.
        vae: who decodes a video together.
        everyone: all processes of this replica.
    """

    config: ParallelConfig
    rank: int
    device: torch.device
    mesh: DeviceMesh
    replica: Group
    cfg: Group
    ring: Group
    ulysses: Group
    tp: Group
    sequence: Group
    shard: Group
    vae: Group
    everyone: Group


def backend(device: torch.device) -> str:
    """The library that moves tensors of a device."""
    return "nccl" if device.type == "cuda" else "gloo"


def join(
    config: ParallelConfig,
    *,
    rank: int,
    store: Store | None = None,
    device: torch.device,
    timeout: float = TIMEOUT,
) -> Groups:
    """Meet the other processes of a layout, and make its groups. Every process of the layout calls it.

    Args:
        rank: of this process, in [0, `config.world`).
        store: where they meet; None: by torchrun's environment variables.
        timeout: seconds that any of them waits for the others.

    Raises:
        ConfigError: torchrun started another number of processes than the layout has.
    """
    if not dist.is_initialized():
        options = {} if store is None else {"store": store, "rank": rank, "world_size": config.world}
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(backend(device), timeout=timedelta(seconds=timeout), **options)
    if dist.get_world_size() != config.world:
        raise ConfigError(f"parallel {config} is a layout of {config.world} processes, and {dist.get_world_size()} run")
    ranks = torch.arange(config.world).view(config.shape)
    mesh = DeviceMesh(device.type, ranks, mesh_dim_names=AXES)

    def group(name: str, kept: tuple[str, ...]) -> Group:
        """The groups that differ along the axes `kept` only; new_group is called by all for all."""
        moved = [AXES.index(a) for a in kept]
        rest = [i for i in range(len(AXES)) if i not in moved]
        table = ranks.permute(*rest, *moved).reshape(
            -1, max(1, int(torch.tensor([config.shape[i] for i in moved]).prod()))
        )
        return _own(name, table, rank)

    axes = {name: group(name, (name,)) for name in AXES}
    return Groups(
        config, rank, device, mesh, **axes,
        sequence=group("sequence", ("ring", "ulysses")),
        shard=group("shard", ("cfg", "ring", "ulysses")),
        vae=_own("vae", torch.arange(config.world).view(-1, config.vae), rank),
        everyone=group("everyone", AXES[1:]),
    )  # fmt: skip


def join_started(config: ParallelConfig, started: Launch, device: torch.device, timeout: float = TIMEOUT) -> Groups:
    """`join` of processes that torchrun started.

    Args:
        started: what torchrun says of this process.
        device: a kind of device; of several GPUs the one of this process's local rank is taken.
    """
    if device.type == "cuda":
        device = torch.device("cuda", started.local)
    return join(config, rank=started.rank, device=device, timeout=timeout)


def leave() -> None:
    """Part from the other processes; without any, nothing."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _own(name: str, table: torch.Tensor, rank: int) -> Group:
    """The group of this rank among the rows of `table`, which all processes make in the same order."""
    own: Group | None = None
    for row in table.tolist():
        handle = dist.new_group(row) if len(row) > 1 else None
        if rank in row:
            own = Group(name, len(row), row.index(rank), tuple(row), handle)  # pyright: ignore[reportArgumentType]
    assert own is not None
    return own
