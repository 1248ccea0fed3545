"""A model directory in diffusers layout: what it says of itself."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from kinetoscope.core.errors import ModelLoadError
from kinetoscope.core.files import write_json
from kinetoscope.core.types import SamplingParams
from kinetoscope.loading.weight_formats import UNQUANTIZED
from kinetoscope.reference import embedded_models

INDEX = "model_index.json"
SIDECAR = "kinetoscope.json"
CONFIG_FILES = ("config.json", "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json")


@dataclass(frozen=True, slots=True)
class Layout:
    """How a model is laid out that is published without `model_index.json`.

    Attributes:
        folder, class_name: recognised by the class that `folder`/config.json names.
        index: what its `model_index.json` would say.
        folders: component -> folder, where they differ.
    """

    folder: str
    class_name: str
    index: Mapping[str, Any]
    folders: Mapping[str, str]


_LAYOUTS: list[Layout] = []


def register_layout(layout: Layout) -> None:
    """Make directories of such a layout known."""
    _LAYOUTS.append(layout)


def find_layout(path: Path) -> Layout | None:
    """The layout of a directory without an index, or None."""
    for layout in _LAYOUTS:
        file = path / layout.folder / CONFIG_FILES[0]
        if file.is_file() and read_json(file).get("_class_name") == layout.class_name:
            return layout
    return None


@dataclass(frozen=True)
class ModelDir:
    """A directory with `model_index.json` (or of a known layout without one) and one folder a component.

    Attributes:
        path: the directory.
        name: what `resolve_model` finds it by: embedded name, hub id, or absolute path.
    """

    path: Path
    name: str

    @cached_property
    def model_index(self) -> dict[str, Any]:
        """The parsed `model_index.json`, or what the layout says in its place."""
        return dict(self.layout.index) if self.layout else read_json(self.path / INDEX)

    @cached_property
    def layout(self) -> Layout | None:
        """The layout, for a directory that has no index."""
        return None if (self.path / INDEX).is_file() else find_layout(self.path)

    @cached_property
    def sidecar(self) -> dict[str, Any]:
        """The parsed `kinetoscope.json` beside it: what diffusers' index has no place for. Empty if there is none."""
        file = self.path / SIDECAR
        return read_json(file) if file.is_file() else {}

    @property
    def defaults(self) -> dict[str, Any]:
        """Sampling defaults of the sidecar: fields of `SamplingParams`.

        Raises:
            ModelLoadError: a field that does not exist.
        """
        values = self.sidecar.get("defaults", {})
        known = [f.name for f in fields(SamplingParams)]
        if not isinstance(values, dict) or not values.keys() <= set(known):
            raise ModelLoadError(
                f"{self.path / SIDECAR}: defaults must be an object with fields among {', '.join(known)}; "
                f"got {values!r}"
            )
        return values

    def components(self) -> dict[str, str]:
        """Component name -> class name, in the order of the index.

        Left out are components that the index leaves empty, and safety checkers: they belong to other packages, may
        have no folder, and are not run.

        Raises:
            ModelLoadError: an entry that is not a pair of library and class name.
        """
        found: dict[str, str] = {}
        for name, value in self.model_index.items():
            if not isinstance(value, list) or name.startswith("_") or name == "safety_checker":
                continue  # the first two are settings of the pipeline class
            if len(value) != 2 or not all(v is None or isinstance(v, str) for v in value):
                raise ModelLoadError(f"{self.path / INDEX}: {name} should be [library, class name]; got {value!r}")
            if value[1] is not None:
                found[name] = value[1]
        return found

    def folder(self, component: str) -> Path:
        """The component's folder.

        Raises:
            ModelLoadError: the index does not list the component, or the folder is missing.
        """
        if component not in self.components():
            raise ModelLoadError(
                f"{self.path / INDEX} lists no component {component!r}; "
                f"it lists {', '.join(self.components()) or 'none'}"
            )
        folder = self._shared(component)
        if folder is None:
            folder = self.path / (self.layout.folders.get(component, component) if self.layout else component)
        if not folder.is_dir():
            raise ModelLoadError(f"{self.path}: the folder of component {component!r} is missing; download it again")
        return folder

    def _shared(self, component: str) -> Path | None:
        """The folder of a component that the sidecar says an embedded model has, {"shared": {component: model}}."""
        shared = self.sidecar.get("shared", {})
        if not isinstance(shared, dict):
            raise ModelLoadError(f"{self.path / SIDECAR}: shared should be an object; got {shared!r}")
        if component not in shared:
            return None
        if (owner := embedded_models().get(str(shared[component]))) is None:
            raise ModelLoadError(
                f"{self.path / SIDECAR}: {component} is shared with {shared[component]!r}, which is no embedded model "
                f"({', '.join(embedded_models())})"
            )
        return owner / component

    def copy(self, target: Path, leave_out: Collection[Path] = ()) -> ModelDir:
        """The directory copied to `target`, which is whole: what was shared is copied too.

        Args:
            target: a folder that `core.files.replacing_folder` makes.
            leave_out: files and folders that are not copied.

        Raises:
            OSError, OutputError: it cannot be written.
        """
        skipped = set(leave_out)

        def ignored(at: str, names: list[str]) -> list[str]:
            return [name for name in names if Path(at, name) in skipped]

        shutil.copytree(self.path, target, ignore=ignored, dirs_exist_ok=True)
        if shared := self.sidecar.get("shared"):
            for component in shared:
                shutil.copytree(self.folder(component), target / component, ignore=ignored)
            own = {k: v for k, v in self.sidecar.items() if k != "shared"}
            write_json(target / SIDECAR, own)
        return ModelDir(target, str(target))

    def config_file(self, component: str) -> Path:
        """The component's configuration file.

        Raises:
            ModelLoadError: there is none.
        """
        folder = self.folder(component)
        for name in CONFIG_FILES:
            if (folder / name).is_file():
                return folder / name
        raise ModelLoadError(f"{folder} has no configuration file; expected one of {', '.join(CONFIG_FILES)}")

    def config(self, component: str) -> dict[str, Any]:
        """The component's parsed configuration.

        Raises:
            ModelLoadError: missing, not JSON, of quantized weights, or the configuration of another class than the
                index names.
        """
        file, expected = self.config_file(component), self.components()[component]
        config = read_json(file)
        if quantized := config.get("quantization_config"):
            kind = quantized.get("quant_method", "an unknown method") if isinstance(quantized, dict) else quantized
            raise ModelLoadError(f"{file}: the weights of {component} are quantized by {kind}; {UNQUANTIZED}")
        own = config.get("_class_name") or config.get("architectures") or expected
        if expected not in (own if isinstance(own, list) else [own]):
            raise ModelLoadError(f"{file} describes {own!r}, but {INDEX} says that {component} is {expected!r}")
        return config

    def fingerprint(self) -> str:
        """SHA-256 (hex) over the names and contents of the index and of all files of the components."""
        total = hashlib.sha256()
        for name, file in sorted(self._files().items()):
            total.update(f"{name.as_posix()}\0{file_digest(file)}\n".encode())
        return total.hexdigest()

    def size(self) -> int:
        """Return the bytes of the files that `fingerprint` reads."""
        return sum(file.stat().st_size for file in self._files().values())

    def _files(self) -> dict[Path, Path]:
        """Return the index and all files of the components, by their names in the directory."""
        files = {} if self.layout else {Path(INDEX): self.path / INDEX}
        for component in self.components():
            folder = self.folder(component)
            files |= {Path(component, f.relative_to(folder)): f for f in folder.rglob("*") if f.is_file()}
        return files


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelLoadError: the file is missing, is not JSON, or holds something else than an object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelLoadError(f"{file} is missing") from error
    except OSError as error:
        raise ModelLoadError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelLoadError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, Mapping):
        raise ModelLoadError(f"{file} should hold a JSON object; it holds a {type(value).__name__}")
    return dict(value)


def file_digest(file: Path) -> str:
    """SHA-256 (hex) of a file's contents; computed once while its size and time stay."""
    blob = file.resolve()
    if file.is_symlink() and len(blob.name) == 64 and set(blob.name) <= set("0123456789abcdef"):
        return blob.name  # the hub's cache names large files by their SHA-256
    stat = blob.stat()
    return _content_digest(blob, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _content_digest(file: Path, size: int, mtime_ns: int) -> str:
    """SHA-256 of the contents; size and time are part of the key, so that a changed file is read again."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
