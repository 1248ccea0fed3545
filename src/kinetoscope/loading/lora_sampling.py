"""How a model is sampled with a LoRA, said in the header of the LoRA's file: what is distilled into four steps makes
noise in thirty."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kinetoscope.core.errors import ModelLoadError
from kinetoscope.loading.directory import ModelDir
from kinetoscope.loading.lora import read_header

HEADER = "kinetoscope.sampling"
"""The header's entry."""


@dataclass(frozen=True)
class LoraSampling:
    """What a file says.

    Attributes:
        of: the class that model_index.json of the models it is for names.
        index: entries of model_index.json, over those of the model.
        defaults: sampling defaults, likewise.
    """

    of: str
    index: Mapping[str, Any]
    defaults: Mapping[str, Any]

    def header(self) -> dict[str, str]:
        """The entry of a file's header."""
        return {HEADER: json.dumps(asdict(self), sort_keys=True)}

    @classmethod
    def read(cls, path: str | Path) -> LoraSampling | None:
        """That of a file; None: it says nothing, as those of other programs.

        Raises:
            ModelLoadError: there is no such file, or its header is not readable.
        """
        text = read_header(path).get(HEADER)
        return None if text is None else cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, where: str) -> LoraSampling:
        """From the text of an entry of the file `where`.

        Raises:
            ModelLoadError: it is not readable.
        """
        try:
            found = cls(**json.loads(text))
            if not isinstance(found.index, dict) or not isinstance(found.defaults, dict):
                raise TypeError("index and defaults should be objects")
        except (ValueError, TypeError) as error:
            raise ModelLoadError(f"{where}: {HEADER} in its header is not readable ({error})") from error
        return found


@dataclass(frozen=True)
class SampledDir(ModelDir):
    """A model directory that is sampled as a LoRA's file says.

    Attributes:
        said: the entry of the file's header.
    """

    said: str

    @cached_property
    def sampling(self) -> LoraSampling:
        """What the file says."""
        return LoraSampling.parse(self.said, self.name)

    @cached_property
    def model_index(self) -> dict[str, Any]:
        """The directory's, and what the file says."""
        return {**ModelDir(self.path, self.name).model_index, **self.sampling.index}

    @cached_property
    def sidecar(self) -> dict[str, Any]:
        """The directory's, with the file's sampling defaults over its own."""
        own = ModelDir(self.path, self.name).sidecar
        return {**own, "defaults": {**own.get("defaults", {}), **self.sampling.defaults}}


def sampled_as(model: ModelDir, sampling: LoraSampling) -> ModelDir:
    """The directory, to be sampled so."""
    return SampledDir(model.path, model.name, sampling.header()[HEADER])
