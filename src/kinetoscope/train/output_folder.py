"""The output folder of a training: which recipe it belongs to, and what its run was trained from.

recipe.json       settings of the run, written when its first start has succeeded
inputs.json       digests of what the run is trained from (`run_inputs`), written with it
run.lock          held while a process trains
checkpoints/, model/, log.jsonl, ...
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinetoscope.core.errors import ConfigError
from kinetoscope.core.file_lock import file_lock
from kinetoscope.core.files import write_text
from kinetoscope.train.recipe import Section
from kinetoscope.train.run_inputs import RunInputs


@dataclass(frozen=True, slots=True)
class OutputFolder:
    """A folder that a recipe names as its output.

    A run claims the folder when its first start has succeeded (`claim`). So a start that fails, for whatever reason,
    leaves a folder that another recipe can be started in.

    Args:
        root: the folder.
        recipe: settings of the run.
        changeable: keys that may differ between two starts of one run, "section.key" for those of a section.
    """

    root: Path
    recipe: Section
    changeable: Set[str] = frozenset()

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.root / "checkpoints"

    @property
    def model(self) -> Path:
        """The folder of the finished model."""
        return self.root / "model"

    @property
    def inputs(self) -> RunInputs:
        """Read what the run is trained from, as far as it was recorded."""
        return RunInputs.read(self.root / "inputs.json")

    @contextmanager
    def held(self) -> Generator[None]:
        """Let no other process train in the folder meanwhile.

        Raises:
            ConfigError: another process trains in it.
            OutputError: the folder cannot be written.
        """
        busy = ConfigError(
            f"output={self.root}: another process trains in this folder; wait for it, stop it, or set output=FOLDER"
        )
        with file_lock(self.root / "run", busy=busy):
            yield

    def check(self, *, fresh: bool = False) -> None:
        """Check that the folder is free, or holds a run of this recipe.

        Args:
            fresh: refuse to continue a run.

        Raises:
            ConfigError: the folder holds a run of another recipe, or of this one if it is to be `fresh`.
        """
        if (theirs := self._record()) is None:
            return
        if fresh:
            raise ConfigError(f"{self.root} already holds a run; delete it or set output=FOLDER to start another")
        mine = self.recipe.model_dump(mode="json")
        theirs = _completed(theirs, mine, self.recipe.model_dump(exclude_defaults=True))
        one, other = _without(mine, self.changeable), _without(theirs, self.changeable)
        changed = [k for k in {**one, **other} if one.get(k) != other.get(k)]
        if changed:
            raise ConfigError(
                f"{self.root} holds a run with another {', '.join(changed)}; set output=FOLDER, or delete it to start "
                "over"
            )

    def check_inputs(self, found: RunInputs, *, resumes: bool) -> None:
        """Check that what the run was trained from so far is there unchanged; see `RunInputs.check`.

        Args:
            resumes: whether the run has a checkpoint; else there is nothing that could have been trained from others.
        """
        if resumes:
            self.inputs.check(found, self.root)

    def claim(self, inputs: RunInputs) -> None:
        """Record that the folder belongs to this recipe, and what its run is trained from. Call it when everything that
        a start needs has been opened.

        Raises:
            OutputError: the folder cannot be written.
        """
        inputs.write(self.root / "inputs.json")
        record = _without(self.recipe.model_dump(mode="json"), {"output"})
        write_text(self.root / "recipe.json", json.dumps(record, indent=1))

    def is_claimed(self) -> bool:
        """Return whether a start has succeeded in this folder."""
        return (self.root / "recipe.json").exists()

    def _record(self) -> dict[str, Any] | None:
        if not self.is_claimed():
            return None
        file = self.root / "recipe.json"
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{file} cannot be read ({error}); set output=FOLDER, or delete {self.root} to start over"
            ) from error


def _completed(theirs: dict[str, Any], mine: dict[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run wrote down before there were some settings, with those that `mine` leaves at their defaults."""
    known = {
        k: _completed(v, mine[k], chosen.get(k) or {}) if isinstance(v, dict) and isinstance(mine.get(k), dict) else v
        for k, v in theirs.items()
    }
    return {**{k: v for k, v in mine.items() if k not in chosen}, **known}


def _without(values: dict[str, Any], keys: Set[str], place: str = "") -> dict[str, Any]:
    """Return sections without some keys, each named with its place."""
    return {
        k: _without(v, keys, f"{place}{k}.") if isinstance(v, dict) else v
        for k, v in values.items()
        if place + k not in keys
    }
