"""Curves for those who watch a training, in TensorBoard and in Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from kinetoscope.core.errors import ConfigError
from kinetoscope.train.post import PostRecipe


class Watcher(Protocol):
    """What is told the values of steps."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One point of each curve; `step` counts from 1."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


def open_watchers(recipe: PostRecipe, folder: Path) -> list[Watcher]:
    """Those that the recipe asks for, and where it says nothing those that are installed.

    Args:
        folder: of the run.

    Raises:
        ConfigError: a package that was asked for is not installed.
    """
    section = recipe.callbacks
    watchers: list[Watcher] = []
    if _wanted(section.tensorboard, "tensorboard"):
        watchers.append(TensorBoard(folder / "tensorboard"))
    if _wanted(section.wandb, "wandb"):
        watchers.append(WandB(recipe, folder, online=bool(section.wandb)))
    return watchers


def _wanted(asked: bool | None, package: str) -> bool:
    return find_spec(package) is not None if asked is None else asked


class TensorBoard:
    """Scalars for TensorBoard.

    Raises:
        ConfigError: it is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("callbacks.tensorboard needs: pip install tensorboard") from error
        self._writer: Any = SummaryWriter(str(folder))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See `Watcher`."""
        for name, value in values.items():
            self._writer.add_scalar(name.replace(".", "/"), value, step)

    def close(self) -> None:
        """See `Watcher`."""
        self._writer.close()


class WandB:
    """Scalars for Weights & Biases.

    Args:
        online: send them; else they stay in the folder, until `wandb sync` sends them.

    Raises:
        ConfigError: it is not installed.
    """

    def __init__(self, recipe: PostRecipe, folder: Path, *, online: bool) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError("callbacks.wandb needs: pip install wandb") from error
        self._run: Any = wandb.init(
            project="kinetoscope", name=recipe.name, config=recipe.model_dump(mode="json"), dir=str(folder),
            mode="online" if online else "offline",
        )  # fmt: skip

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See `Watcher`."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """See `Watcher`."""
        self._run.finish()
