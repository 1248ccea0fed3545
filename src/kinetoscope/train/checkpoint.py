"""Checkpoints: one file, replaced as a whole, so that a kill at any moment leaves the last good one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kinetoscope.core.errors import ConfigError, OutputError
from kinetoscope.core.files import replacing


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path`, whole or not at all. The same state gives the same bytes.

    Raises:
        OutputError: the file cannot be written; an older checkpoint is left as it was.
    """
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            torch.save(state, file)  # given a path, torch writes its name into the file
    except RuntimeError as error:  # torch's, where the disk is full
        raise OutputError(f"checkpoint {path} cannot be written: {error}") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state saved at `path`.

    Raises:
        ConfigError: the file is not a checkpoint.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ConfigError(
            f"checkpoint {path} cannot be read ({type(error).__name__}); delete it to start over"
        ) from error
