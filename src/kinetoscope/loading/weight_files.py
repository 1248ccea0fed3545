"""Which files of a component's folder hold its weights: one file, shards, one of several precisions."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from kinetoscope.core.errors import ModelLoadError
from kinetoscope.loading.directory import read_json
from kinetoscope.loading.weight_formats import describe_other_weights

logger = logging.getLogger("kinetoscope.loading")

SUFFIX = ".safetensors"
_SHARD = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<variant>\.[\w-]+)?\.safetensors")
_INDEX = re.compile(r"(?P<name>.+)\.safetensors\.index(?P<variant>\.[\w-]+)?\.json")


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a component: the shards of its index, a whole set of shards, or its only file.

    Of a component that is saved in several precisions (diffusers' `variant`, `model.fp16.safetensors`) the one whose
    name has no suffix is taken.

    Raises:
        ModelLoadError: there are none (the message says what there is instead), a shard is missing, or several files
            do not say how they belong together.
    """
    return _chosen(folder)[1]


def weight_variant(folder: Path, name: str) -> str | None:
    """Return the suffix of the precision that `weight_files` takes ("fp16" of `NAME.fp16.safetensors`), or None.

    Raises:
        ModelLoadError: see `weight_files`.
    """
    chosen = _chosen(folder)[0]
    return chosen.removeprefix(f"{name}.") if chosen.startswith(f"{name}.") else None


def _chosen(folder: Path) -> tuple[str, list[Path]]:
    """Return the name of the set of files that is read (without shard numbers, with its precision) and its files."""
    indexes = {_name(match): file for file in _sorted(folder) if (match := _INDEX.fullmatch(file.name))}
    sets: dict[str, list[Path]] = {}
    for file in _sorted(folder):
        if file.suffix == SUFFIX:
            shard = _SHARD.fullmatch(file.name)
            sets.setdefault(_name(shard) if shard else file.name.removesuffix(SUFFIX), []).append(file)
    if not indexes and not sets:
        raise ModelLoadError(f"{folder} holds no {SUFFIX} weights{describe_other_weights(folder)}")
    plain = {name for name in (*indexes, *sets) if not any(name.startswith(f"{n}.") for n in (*indexes, *sets))}
    names = [*(plain & indexes.keys() or plain & sets.keys() or indexes or sets)]  # without the suffix of a precision
    names.sort()
    if len(names) > 1:
        files = [indexes[n].name if n in indexes else sets[n][0].name for n in names]
        raise ModelLoadError(
            f"{folder} holds {len(names)} weight files and no index.json that says how they belong: "
            f"{', '.join(files)}; keep the one that is the model in the folder"
        )
    name = names[0]
    if name in indexes:
        return name, _of_index(folder, indexes[name], sets.get(name, []))
    return name, _of_set(folder, sets[name])


def _of_index(folder: Path, index: Path, present: Collection[Path]) -> list[Path]:
    """Return the shards that an index names."""
    weight_map: Any = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ModelLoadError(f"{index} is not a readable index of shards: it has no object weight_map of file names")
    shards = sorted(set(weight_map.values()))
    if outside := [s for s in shards if Path(s).name != s]:
        raise ModelLoadError(f"{index} names files outside its folder: {', '.join(outside)}")
    if missing := [s for s in shards if not (folder / s).is_file()]:
        raise ModelLoadError(
            f"{folder}: shards {', '.join(missing)} are missing, which {index.name} names; download the model again"
        )
    if extra := [file.name for file in present if file.name not in shards]:
        logger.warning("%s does not name %s, which is not read", index, ", ".join(extra))
    return [folder / s for s in shards]


def _of_set(folder: Path, files: list[Path]) -> list[Path]:
    """Return the one file, or all shards of a set without an index, whose names say how many there are."""
    shards = [match for file in files if (match := _SHARD.fullmatch(file.name))]
    if not shards:
        return files
    counts = {match["count"] for match in shards}
    if len(counts) > 1 or len(shards) != len(files):
        raise ModelLoadError(
            f"{folder} holds parts of several sets of shards and no index.json that says how they belong: "
            f"{', '.join(file.name for file in files)}; download the model again"
        )
    count = int(counts.pop())
    there = {int(match["number"]) for match in shards}
    if missing := [str(number) for number in range(1, count + 1) if number not in there][:count]:
        raise ModelLoadError(
            f"{folder}: shards {', '.join(missing[:4])} of {count} are missing, and there is no index.json; download "
            "the model again"
        )
    return files


def _name(match: re.Match[str]) -> str:
    return match["name"] + (match["variant"] or "")


def _sorted(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())
