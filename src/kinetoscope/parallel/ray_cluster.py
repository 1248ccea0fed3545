"""The Ray cluster of this program: joined or started for the first who needs one, and left after the last."""

from __future__ import annotations

import logging
import os
import threading
from typing import Any

import ray

from kinetoscope.core.errors import ConfigError

HERE = "local"
"""Ray's own word for a new cluster of this machine alone."""


class _Cluster:
    """How many of this program use a cluster that was started or joined for them."""

    lock = threading.Lock()
    users = 0
    ours = False


def enter_cluster(address: str | None = None, processes: int | None = None) -> None:
    """Join the cluster of this program, or the one at an address, or (None) start one on this machine.

    Args:
        processes: that will share the cores of this machine; a cluster that is started has room for as many.

    Raises:
        ConfigError: it cannot be reached.
    """
    with _Cluster.lock:
        if not ray.is_initialized():
            cores = {} if processes is None else {"num_cpus": max(os.cpu_count() or 1, processes)}
            alone: dict[str, Any] = {} if address else {"include_dashboard": False, **cores}
            try:
                ray.init(address=address or HERE, logging_level=logging.WARNING, **alone)
            except (ConnectionError, RuntimeError, ValueError) as error:
                why = " ".join(str(error).split())
                raise ConfigError(f"the Ray cluster at {address or HERE!r} cannot be joined: {why}") from error
            _Cluster.ours = True
        _Cluster.users += 1


def leave_cluster() -> None:
    """End the cluster if it was started or joined here and nobody uses it any more."""
    with _Cluster.lock:
        _Cluster.users -= 1
        if _Cluster.users == 0 and _Cluster.ours:
            _Cluster.ours = False
            ray.shutdown()


def reason(error: BaseException) -> str:
    """What Ray says of an error, in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
