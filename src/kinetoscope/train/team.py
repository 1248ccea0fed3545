"""The processes of one training: which micro-batches each takes, what they share, and what they agree on.

An update is made of the recipe's micro-batches, however many devices there are, and what is drawn for each is a
function of its number: so one device and many have the same losses, to the order of sums. `replicas` are the devices
that take different micro-batches, `ulysses` and `ring` share the tokens of each, and `fsdp` the weights, among all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kinetoscope.core.config import launch
from kinetoscope.core.errors import ConfigError, KinetoscopeError, WorkerError
from kinetoscope.loading.components import shard_plan
from kinetoscope.parallel import Groups, ParallelConfig
from kinetoscope.parallel.groups import TIMEOUT, join_started, leave
from kinetoscope.parallel.placement import average_gradients, clip_gradients, place_module
from kinetoscope.parallel.sequence import SequenceShard
from kinetoscope.train.loop import clip_norm

ResultT = TypeVar("ResultT")
PATIENCE = timedelta(days=2)
"""How long processes wait for what the first one does alone: data to be encoded, a model to be written."""


@dataclass(frozen=True, slots=True)
class Team:
    """This process among those of its training.

    Attributes:
        device: it computes on.
        groups: its place; None: it is the only one.
        words: of torch; by it small things of host memory are told.
        patience: of torch; as `words`, where it may take long.
    """

    device: torch.device
    groups: Groups | None = None
    words: Any = None
    patience: Any = None

    @property
    def leads(self) -> bool:
        """Whether this is the process that tells and writes."""
        return self.groups is None or self.groups.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.groups is not None

    @property
    def shard(self) -> SequenceShard | None:
        """Who shares the tokens of a forward; None: each has them all."""
        return SequenceShard.of(self.groups) if self.groups is not None and self.groups.sequence.size > 1 else None

    def micro_batches(self, count: int) -> range:
        """Numbers of those of `count` that are this process's."""
        return range(count) if self.groups is None else range(self.groups.cfg.index, count, self.groups.cfg.size)

    # -- models -------------------------------------------------------------------------------------------------------

    def place(self, module: nn.Module, class_name: str) -> None:
        """Share out the weights of a transformer, if the layout says so.

        Raises:
            ConfigError: its family has not said how.
        """
        if self.groups is None or not self.groups.config.fsdp:
            return
        plan = shard_plan(class_name)
        if plan is None:
            raise ConfigError(f"parallel fsdp: nothing says how the weights of a {class_name} are shared out")
        place_module(module, plan, self.groups)

    def clip(self, module: nn.Module, limit: float) -> float:
        """Gradients of the whole update, at most of norm `limit`; the norm before."""
        if self.groups is None:
            return clip_norm(module, limit)
        average_gradients(module, self.groups)
        return clip_gradients(module, self.groups, limit)

    # -- words --------------------------------------------------------------------------------------------------------

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """The means over all processes, each of which has the same names."""
        if self.groups is None:
            return dict(values)
        told = torch.tensor(list(values.values()), dtype=torch.float64)
        dist.all_reduce(told, group=self.words)
        return dict(zip(values, (told / self.groups.config.world).tolist(), strict=True))

    def most(self, value: int) -> int:
        """The largest of what the processes say."""
        told = torch.tensor(value)
        if self.groups is not None:
            dist.all_reduce(told, dist.ReduceOp.MAX, group=self.words)
        return int(told)

    def alone(self, work: Callable[[], ResultT]) -> ResultT:
        """Let the first process do `work`, however long it takes, while the others wait.

        Returns:
            The result of `work` in every process; it can be pickled.

        Raises:
            KinetoscopeError: the error of `work`, in every process.
        """
        told: list[Any] = [None, None]
        if self.leads:
            try:
                told[1] = work()
            except KinetoscopeError as error:
                told[0] = error
        if self.groups is not None:
            dist.broadcast_object_list(told, src=0, group=self.patience)
        if told[0] is not None:
            raise told[0]
        return told[1]


def is_of_others(error: BaseException) -> bool:
    """Whether torch says that another process is gone or does not answer."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def whole(values: Mapping[str, Tensor], *, kept: bool) -> dict[str, Tensor]:
    """Tensors with the parts that other processes have, on the CPU; all of them call it.

    Args:
        kept: whether this process wants them, or only gives its parts.
    """
    found: dict[str, Tensor] = {}
    for name, value in values.items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if kept:
            found[name] = full.cpu()
    return found


def layout(config: ParallelConfig) -> ParallelConfig:
    """A training's layout as inference's: its replicas go in step, so that they can share weights, as those do that
    share the rows of a forward."""
    return replace(config, replicas=1, cfg=config.replicas)


@contextmanager
def join_team(config: ParallelConfig, device: str, groups: Groups | None = None) -> Iterator[Team]:
    """Meet the other processes of a training, and part from them.

    Args:
        config: the `parallel` section of the recipe.
        device: the kind.
        groups: where the caller has joined the processes of `layout(config)`; None: as torchrun says.

    Raises:
        ConfigError: there are more or fewer processes than the section says.
        WorkerError: another process failed or is gone.
    """
    joined = groups
    if joined is None:
        started = launch()
        there = 1 if started is None else started.world
        if there != config.world:
            raise ConfigError(
                f"parallel ({config}) is a layout of {config.world} processes, and {there} run; set parallel.replicas, "
                f"or start them: torchrun --nproc-per-node {config.world} -m kinetoscope train RECIPE"
            )
        if started is None or config.world == 1:
            yield Team(torch.device(device))
            return
        joined = join_started(layout(config), started, torch.device(device))
    short, long = (dist.new_group(backend="gloo", timeout=t) for t in (timedelta(seconds=TIMEOUT), PATIENCE))
    try:
        yield Team(joined.device, joined, short, long)
    except RuntimeError as error:
        if is_of_others(error):
            raise WorkerError(
                f"rank {joined.rank}: another process of this training failed, stopped or is gone; its own message "
                "says why, and the same command continues from the newest checkpoint "
                f"({' '.join(str(error).split())[:200]})",
                rank=joined.rank, stage="training",
            ) from error  # fmt: skip
        raise
    finally:
        if groups is None:
            leave()
