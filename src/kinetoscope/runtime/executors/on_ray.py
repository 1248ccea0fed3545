"""One process a device anywhere on a Ray cluster: `executor="ray"`.

Every worker is an actor in a bundle of a placement group of its own. Orders go to it as calls, and what it says is
fetched by a call that waits for it, so that an actor which dies or stops answers as a process of this machine does.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch._C._distributed_c10d import TCPStore

from kinetoscope.core.errors import ConfigError
from kinetoscope.loading import ModelDir
from kinetoscope.parallel import ParallelConfig
from kinetoscope.parallel.ray_cluster import enter_cluster, leave_cluster, reason
from kinetoscope.runtime.executors.base import ExecutorSpec
from kinetoscope.runtime.executors.gang import Gang, Inbox, Link
from kinetoscope.runtime.executors.orders import Died, Said, Setup, Told
from kinetoscope.runtime.executors.pool import Pool
from kinetoscope.runtime.executors.processes import Countdown, MakeSetup

POLL = 2.0
"""Seconds that one call waits for what a worker says."""


class RayExecutor(Pool):
    """Actors of a Ray cluster, one a rank, watched and started again.

    Args:
        config: the layout.
        model: the directory, which every node must have under the same path.
        spec: times after which a process is given up, and the cluster's address.
        setup: what each process opens.
        device: of what kind each rank's device is; Ray says which GPU.

    Raises:
        ConfigError: the cluster cannot be reached, or has too few devices.
    """

    def __init__(
        self, config: ParallelConfig, model: ModelDir, spec: ExecutorSpec, setup: MakeSetup, device: torch.device
    ) -> None:
        own = replace(config, replicas=1)
        # On the CPU a device is a process, and any number may share the cores.
        enter_cluster(spec.address, config.world if device.type == "cpu" else None)
        # Made before the pool's, so that it is called after it: first the actors end, then the cluster of this program.
        self._leaving = weakref.finalize(self, leave_cluster)
        if spec.address is None and device.type == "cuda" and (found := _gpus()) < config.world:
            self._leaving()
            raise ConfigError(
                f"parallel {config} is a layout of {config.world} devices, and this machine has {found} GPUs; "
                "join a cluster with executor='ray:address=auto' (docs/parallel.md)"
            )
        gangs = [Gang(i, own, spec, _Starter(i, own, spec, setup, device)) for i in range(config.replicas)]
        super().__init__("ray", config, model, gangs)

    def close(self) -> None:
        """See `Executor.close`. A cluster that this executor started ends with the last one that uses it."""
        super().close()
        self._leaving()


def _gpus() -> int:
    """Of the cluster."""
    return int(ray.cluster_resources().get("GPU", 0))


# -- a worker, there --------------------------------------------------------------------------------------------------


class Seat:
    """An actor: a worker on a thread of its own, what it is told, and what it says.

    Arrays travel inside pickles rather than in Ray's shared memory, where they could not be written to.
    """

    def __init__(self) -> None:
        self._said: queue.Queue[Said | None] = queue.Queue()
        self._store: TCPStore | None = None
        self._worker: Any = None

    def place(self) -> tuple[str, int]:
        """(node, process id) of this actor."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def meet(self) -> tuple[str, int]:
        """(host, port) at which this actor lets all ranks meet."""
        host = ray.util.get_node_ip_address()
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        return host, self._store.port

    def begin(self, setup: Setup) -> None:
        """Open the model, and then do what comes."""
        from kinetoscope.runtime.executors.worker import Worker  # it opens generators, and they open executors

        self._worker = Worker(setup, self._said.put)
        threading.Thread(target=self._live, daemon=True).start()

    def post(self, message: bytes) -> None:
        """Tell the worker something (a pickle of `Told`)."""
        self._worker.post(pickle.loads(message))

    def take(self) -> bytes:
        """What the worker has said since the last call, in order: a pickle of a list; None in it is the end."""
        said: list[Said | None] = []
        with contextlib.suppress(queue.Empty):
            said.append(self._said.get(timeout=POLL))
            while True:
                said.append(self._said.get_nowait())
        return pickle.dumps(said, protocol=5)

    def _live(self) -> None:
        try:
            self._worker.serve()
        finally:
            self._said.put(None)


# -- a worker, seen from here -----------------------------------------------------------------------------------------


class _Starter:
    """Starts the actors of one replica, on as few nodes as there are devices for."""

    def __init__(
        self, replica: int, config: ParallelConfig, spec: ExecutorSpec, setup: MakeSetup, device: torch.device
    ) -> None:
        self.replica = replica
        self.config = config
        self.spec = spec
        self.setup = setup
        self.needs = {"CPU": 1.0, "GPU": 1.0} if device.type == "cuda" else {"CPU": 1.0}

    def __call__(self, inbox: Inbox) -> Sequence[Link]:
        world = self.config.world
        group = placement_group([self.needs] * world, strategy="PACK")
        left = Countdown(world, lambda: _remove(group))
        seats: list[Any] = []
        try:
            if not group.wait(self.spec.start):
                raise ConfigError(
                    f"executor='ray': no {world} devices ({_words(self.needs)} each) were free within "
                    f"{self.spec.start:.0f} s; the cluster has {_words(ray.cluster_resources())}"
                )
            seats = [self._seat(group, i) for i in range(world)]
            places = ray.get([seat.place.remote() for seat in seats], timeout=self.spec.start)
            # Neighbours in rank talk most, so those of one node get ranks in a row.
            order = sorted(range(world), key=lambda i: places[i])
            host, port = ray.get(seats[order[0]].meet.remote(), timeout=self.spec.start)
            for rank, i in enumerate(order):
                seats[i].begin.remote(self.setup(self.replica, rank, (host, port)))
        except BaseException as error:
            for seat in seats:
                ray.kill(seat)
            _remove(group)
            if isinstance(error, RayError):
                raise ConfigError(f"executor='ray': the workers cannot start: {reason(error)}") from error
            raise
        node = ray.get_runtime_context().get_node_id()
        return [
            _Actor(seats[i], places[i][1] if places[i][0] == node else None, rank, inbox, left)
            for rank, i in enumerate(order)
        ]

    def _seat(self, group: PlacementGroup, bundle: int) -> Any:
        """An actor; calls of `post` keep their order, and `take` waits beside them."""
        where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
        remote: Any = ray.remote  # its types do not know groups
        made = remote(concurrency_groups={"out": 1})(Seat).options(
            num_cpus=self.needs["CPU"], num_gpus=self.needs.get("GPU", 0.0), scheduling_strategy=where
        )
        return made.remote()


class _Actor:
    """The way to one actor, and the thread that hears it; see `Link`."""

    def __init__(self, seat: Any, pid: int | None, rank: int, inbox: Inbox, gone: Callable[[], None]) -> None:
        self._seat = seat
        self.pid = pid
        self._ended = threading.Event()
        self._hearing = threading.Thread(target=self._hear, args=(rank, inbox, gone), daemon=True)
        self._hearing.start()

    def send(self, message: Told) -> None:
        """See `Link`; an actor that is gone is told by what hears it."""
        self._seat.post.remote(pickle.dumps(message, protocol=5))

    def kill(self) -> None:
        """See `Link`."""
        if self._ended.is_set():
            return
        if self.pid is not None:  # Ray asks a process to end, which a stopped one does not hear
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        self._give_up()
        self._hearing.join(timeout=10.0)

    def wait(self, seconds: float) -> bool:
        """See `Link`."""
        return self._ended.wait(seconds)

    def _hear(self, rank: int, inbox: Inbox, gone: Callable[[], None]) -> None:
        how = "ended"
        try:
            while True:
                said = pickle.loads(ray.get(self._seat.take.options(concurrency_group="out").remote()))
                for message in said:
                    if message is not None:
                        inbox.put((rank, message))
                if None in said:
                    break
        except Exception as error:  # of Ray, or of its connection
            how = f"died ({reason(error)})"
        inbox.put((rank, Died(how)))
        self._give_up()
        self._ended.set()
        gone()

    def _give_up(self) -> None:
        if ray.is_initialized():  # else it would start a cluster
            with contextlib.suppress(Exception):
                ray.kill(self._seat)


def _remove(group: PlacementGroup) -> None:
    if ray.is_initialized():
        with contextlib.suppress(Exception):
            remove_placement_group(group)


def _words(resources: Mapping[str, float]) -> str:
    """The devices among resources, in words."""
    return ", ".join(f"{resources.get(name, 0):.0f} {name}" for name in ("CPU", "GPU") if name in resources) or "none"
