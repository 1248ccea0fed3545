"""Modules of other packages that register families, solvers, backends, caches, methods or data sources on import.

They are found in two ways: by name (`--import MODULE`, `load_extensions`), or as entry points of an installed package
in the group `kinetoscope.extensions`. Worker processes import the same ones, and a replay record names them.
"""

from __future__ import annotations

import importlib
import logging
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kinetoscope.core.errors import ConfigError

logger = logging.getLogger("kinetoscope.extensions")

GROUP = "kinetoscope.extensions"


@dataclass(frozen=True, slots=True)
class Extension:
    """A module that was imported as an extension.

    Attributes:
        module: its name, as `--import` takes it.
        version: of its package; None where it tells none.
    """

    module: str
    version: str | None = None


_loaded: dict[str, Extension] = {}
_named: list[str] = []
_failed: dict[str, str] = {}
_searched = False
_lock = threading.RLock()


def load_extensions(modules: Sequence[str] = ()) -> tuple[Extension, ...]:
    """Import the extensions that are installed (once a process), and those that are named.

    An installed extension that cannot be imported is left out with one warning, and everything else works.

    Args:
        modules: names of modules. One that is not on the module path is looked for in the current folder too.

    Returns:
        all extensions that this process has loaded.

    Raises:
        ConfigError: a named module does not exist, or fails when it is imported.
    """
    global _searched
    with _lock:
        if not _searched:
            _searched = True
            _load_installed()
        for name in modules:
            _load_named(name)
        return tuple(_loaded.values())


def loaded_extensions() -> tuple[Extension, ...]:
    """Return the extensions that this process has loaded."""
    return tuple(_loaded.values())


def named_extensions() -> tuple[str, ...]:
    """Return the modules that were named in this process; workers find the installed ones by themselves."""
    return tuple(_named)


def failed_extensions() -> dict[str, str]:
    """Return the name of each installed extension that could not be imported -> why."""
    return dict(_failed)


def missing_extensions(recorded: Sequence[dict[str, Any]]) -> list[str]:
    """Return "MODULE VERSION" of each recorded extension that this process has not loaded."""
    return [f"{e['module']} {e['version'] or ''}".strip() for e in recorded if e["module"] not in _loaded]


def _load_installed() -> None:
    for point in metadata.entry_points(group=GROUP):
        package = f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown package"
        try:
            made: Any = point.load()
            if point.attr:
                made()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a module may even call sys.exit
            _failed[point.name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
            logger.warning("extension %r of %s is left out: %s", point.name, package, _failed[point.name])
        else:
            _loaded[point.module] = Extension(point.module, point.dist.version if point.dist else None)


def _load_named(name: str) -> None:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(f"--import {name!r} is not the name of a module; write it as in Python: package.module")
    top = name.partition(".")[0]
    try:
        if find_spec(top) is None and str(Path.cwd()) not in sys.path:
            sys.path.append(str(Path.cwd()))
            importlib.invalidate_caches()
        module = importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ConfigError(
                f"--import {name}: there is no module {error.name!r}; install its package, or add its "
                "folder to PYTHONPATH"
            ) from error
        raise ConfigError(f"--import {name}: it needs the module {error.name!r}, which is not installed") from error
    except BaseException as error:  # a module may even call sys.exit
        raise ConfigError(f"--import {name} failed: {type(error).__name__}: {error}") from error
    if name not in _named:
        _named.append(name)
    _loaded.setdefault(name, Extension(name, _version(top, module)))


def _version(package: str, module: Any) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        found = getattr(module, "__version__", None) or getattr(sys.modules.get(package), "__version__", None)
        return None if found is None else str(found)
