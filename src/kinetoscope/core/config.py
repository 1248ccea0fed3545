"""Settings from the environment: the only module that reads it.

Each field is `KINETOSCOPE_<FIELD NAME IN CAPITALS>`; `settings()` reads them once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from kinetoscope.core.errors import ConfigError
from kinetoscope.core.spec import unknown

PREFIX = "KINETOSCOPE_"
_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"", "0", "false", "no", "off"}


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of a process.

    Attributes:
        denoising_perf_logging: log time per denoising step and in all (also `VideoGenerator(..., perf_logging=True)`).
        attention: attention backend where neither a program nor a command names one, as `--attention` takes it;
            "auto" chooses for each role.
        offline: never ask the hub; only local paths, embedded models and what is already in the hub's cache.
    """

    attention: str = "auto"
    denoising_perf_logging: bool = False
    offline: bool = False


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Settings from a mapping such as `os.environ`.

    Raises:
        ConfigError: a variable has a value of the wrong kind, or its name starts with the prefix and is unknown.
    """
    names = [PREFIX + field.name.upper() for field in fields(Settings)]
    for name in environment:
        if name.startswith(PREFIX) and name not in names:
            raise ConfigError(unknown("environment variable", name, names))
    values: dict[str, Any] = {}
    for field in fields(Settings):
        name = PREFIX + field.name.upper()
        text = environment.get(name)
        if text is None:
            continue
        if isinstance(field.default, str):
            values[field.name] = text.strip() or field.default
            continue
        if text.strip().lower() not in _TRUE | _FALSE:
            raise ConfigError(f"environment variable {name}={text!r} is not a switch; use 1 or 0")
        values[field.name] = text.strip().lower() in _TRUE
    return Settings(**values)


@cache
def settings() -> Settings:
    """The settings of this process, read once."""
    return read_settings(os.environ)


@dataclass(frozen=True, slots=True)
class Launch:
    """This process among those that torchrun started.

    Attributes:
        rank, world: of all machines.
        local: among those of this machine: which of its devices to use.
    """

    rank: int
    world: int
    local: int


def read_launch(environment: Mapping[str, str]) -> Launch | None:
    """What torchrun says in a mapping such as `os.environ`; None where it did not start this process.

    Raises:
        ConfigError: one of its variables is not a number.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if any(n not in environment for n in (*names, "MASTER_ADDR", "MASTER_PORT")):
        return None
    try:
        return Launch(*(int(environment[n]) for n in names))
    except ValueError as error:
        raise ConfigError(f"environment variables {', '.join(names)} of torchrun are not numbers: {error}") from error


@cache
def launch() -> Launch | None:
    """This process among those that torchrun started, or None; read once."""
    return read_launch(os.environ)


def onednn_limit() -> str:
    """Return the highest instruction set that oneDNN may use here, such as "AVX2"; "" where it may use all."""
    return onednn_limit_setting().partition("=")[2].upper()


def onednn_limit_setting() -> str:
    """Return the environment variable that limits oneDNN, as "ONEDNN_MAX_CPU_ISA=AVX2"; "" where none is set."""
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        if value := os.environ.get(name):
            return f"{name}={value}"
    return ""
