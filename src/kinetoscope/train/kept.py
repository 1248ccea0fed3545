"""The checkpoints of a run: the newest few, each replaced as a whole.

One process writes one file. Several write a folder in torch's distributed format, each what it has of the weights; it
is read by any number of processes, as a file is, and each takes its part.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, distribute_tensor

from kinetoscope.core.errors import ConfigError, OutputError
from kinetoscope.core.files import PART, publish_folder, remove, temporary_beside
from kinetoscope.train.checkpoint import load_checkpoint, save_checkpoint
from kinetoscope.train.team import Team, is_of_others

HALF_WRITTEN = (f".*{PART}", "step-*.tmp")
"""Names of checkpoints that a kill left half written; the second is of earlier versions."""


def save_shared(path: Path, state: dict[str, Any], team: Team) -> None:
    """Write what all processes have of `state` to the folder `path` through a temporary name. All of them call it.

    Raises:
        OutputError: one of them cannot write.
    """
    temporary = team.alone(lambda: temporary_beside(path))
    try:
        state_dict_saver.save(state, checkpoint_id=temporary)
        team.alone(lambda: _publish(temporary, path))
    except (CheckpointException, OSError) as error:
        raise _unwritable(path, error) from error
    finally:
        if team.leads:
            remove(temporary)


def load_shared(path: Path, like: dict[str, Any]) -> dict[str, Any]:
    """`like` with the values that the folder `path` has for it; tensors are filled where they are.

    Raises:
        ConfigError: the folder is not a checkpoint of such a state.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process may read it, too
            state_dict_loader.load(like, checkpoint_id=path, no_dist=not dist.is_initialized())
    except (Exception, CheckpointException) as error:  # torch raises many kinds for a damaged file
        if is_of_others(error):
            raise
        raise _unreadable(path, error) from error
    return like


@dataclass(frozen=True, slots=True)
class KeptCheckpoints:
    """A `loop.Store`: the newest `keep` checkpoints of a folder.

    Attributes:
        team: who writes them.
        like: gives a state as this process has it: its weights, or its parts of them.
    """

    folder: Path
    keep: int
    team: Team
    like: Callable[[], dict[str, Any]]

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write one, then remove what is older than the last `keep`, and what a kill left half written."""
        path = self.folder / f"step-{step:08d}.pt"
        if self.team.several:
            save_shared(path.with_suffix(""), state, self.team)
        else:
            save_checkpoint(path, state)
        if self.team.leads:
            left = (name for pattern in HALF_WRITTEN for name in self.folder.glob(pattern))
            for old in (*self._found()[: -self.keep], *left):
                remove(old)

    def holds_any(self) -> bool:
        """Return whether there is a checkpoint."""
        return bool(self._found())

    def load(self) -> dict[str, Any] | None:
        """The newest, as this process has it."""
        found = self._found()
        if not found:
            return None
        like = {**self.like(), "step": 0, "seconds": 0.0}
        return load_shared(found[-1], like) if found[-1].is_dir() else _taken(load_checkpoint(found[-1]), like)

    def _found(self) -> list[Path]:
        return sorted((p for p in self.folder.glob("step-*") if p.suffix != ".tmp"), key=lambda p: p.stem)


def _taken(found: Any, like: Any) -> Any:
    """A state with this process's part of each tensor that others share, and tensors on the devices of `like`'s."""
    if isinstance(found, Mapping):
        return {k: _taken(v, like[k] if isinstance(like, Mapping) and k in like else None) for k, v in found.items()}
    if isinstance(found, Tensor) and isinstance(like, Tensor):
        found = found.to(like.device)
        if isinstance(like, DTensor):  # cut where it is: every process has read all of it
            return distribute_tensor(found, like.device_mesh, like.placements, src_data_rank=None)
    return found


def _publish(temporary: Path, path: Path) -> None:
    try:
        publish_folder(temporary, path)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: BaseException) -> OutputError:
    return OutputError(f"checkpoint {path} cannot be written: {error}")


def _unreadable(path: Path, error: BaseException) -> ConfigError:
    return ConfigError(f"checkpoint {path} cannot be read ({type(error).__name__}); delete it to start over")
