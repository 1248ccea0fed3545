"""Weights from safetensors into a module built on the meta device."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kinetoscope.core.errors import ModelLoadError
from kinetoscope.core.sharding import Cut, Share, take

SHOWN = 4
"""Keys of each kind that an error names; the rest is counted."""

DtypePolicy = Callable[[str], torch.dtype]
KeyMap = Mapping[str, str] | Callable[[str], str]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component: the shards its index names, or its only file.

    Raises:
        ModelLoadError: there are none, a shard is missing, or there are several and no index.
    """
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        try:
            shards = sorted(set(json.loads(indexes[0].read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, OSError) as error:
            raise ModelLoadError(f"{indexes[0]} is not a readable index of shards ({error!r})") from error
        if outside := [s for s in shards if Path(s).name != s]:
            raise ModelLoadError(f"{indexes[0]} names files outside its folder: {', '.join(map(str, outside))}")
        missing = [s for s in shards if not (folder / s).is_file()]
        if missing:
            raise ModelLoadError(f"{folder}: shards {', '.join(missing)} are missing; download the model again")
        return [folder / s for s in shards]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelLoadError(f"{folder} holds no .safetensors weights; download the model again")
    if len(files) > 1:
        raise ModelLoadError(f"{folder} holds {len(files)} weight files and no index.json that says how they belong")
    return files


def tensor_names(files: list[Path]) -> list[str]:
    """Keys of all files, from their headers alone.

    Raises:
        ModelLoadError: a file is truncated or is not safetensors.
    """
    names: list[str] = []
    for file in files:
        try:
            with safe_open(file, "pt", device="cpu") as content:
                names += content.keys()
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(
                f"{file} is truncated or not a safetensors file ({error}); download it again"
            ) from error
    return names


def tensor_shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Key -> shape of all files, from their headers alone.

    Raises:
        ModelLoadError: a file is truncated or is not safetensors.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, "pt", device="cpu") as content:
                shapes |= {k: tuple(content.get_slice(k).get_shape()) for k in content.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(
                f"{file} is truncated or not a safetensors file ({error}); download it again"
            ) from error
    return shapes


class Stored(NamedTuple):
    """A tensor of a file.

    Attributes:
        file, key: where it is.
        shape: of the whole.
        tensor: of it, what was asked for.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    tensor: Tensor


def read_tensors(files: list[Path], cuts: Callable[[str], Sequence[Cut]] | None = None) -> Iterator[Stored]:
    """All tensors of all files, one at a time.

    Args:
        files: to read.
        cuts: key -> the part to read; nothing else of the tensor comes into memory. None: all of each.

    Raises:
        ModelLoadError: a file is truncated or is not safetensors.
    """
    for file in files:
        try:
            with safe_open(file, "pt", device="cpu") as content:
                for key in content.keys():  # noqa: SIM118 - not a mapping
                    stored, wanted = content.get_slice(key), cuts(key) if cuts else ()
                    shape = tuple(stored.get_shape())
                    fits = all(cut.dim < len(shape) for cut in wanted)  # else the caller refuses it by its shape
                    part = take(stored, shape, wanted) if wanted and fits else content.get_tensor(key)
                    yield Stored(file, key, shape, part)
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(
                f"{file} is truncated or not a safetensors file ({error}); download it again"
            ) from error


def load_weights(
    module: nn.Module,
    folder: Path,
    *,
    dtype: DtypePolicy,
    device: torch.device,
    key_map: KeyMap | None = None,
    check_finite: bool = True,
    share: Share | None = None,
) -> nn.Module:
    """Fill `module`, built on the meta device, from the files of `folder`.

    Each tensor is copied on its way: tensors mapped from a file are not 64-byte aligned, which costs speed and the last
    bits of a result (measured: 1e-7 to 2e-6).

    Args:
        dtype: parameter name -> dtype.
        key_map: prefix of a stored key -> prefix of our name, where they differ; or stored key -> our name.
        check_finite: refuse NaN and infinity, at the price of one pass over the weights.
        share: what this process holds of each tensor, and only that is read; None: all of it.

    Raises:
        ModelLoadError: missing, unexpected, wrongly shaped or not finite tensors, each named with its file.
    """
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    shared = _shared_names(module)
    found: dict[str, Tensor] = {}
    problems: dict[str, list[str]] = {"unexpected": [], "wrong shape": [], "not finite": []}
    named = partial(rename_key, key_map=key_map or {})
    for file, key, shape, tensor in read_tensors(
        weight_files(folder), None if share is None else lambda key: share.cuts(named(key))
    ):
        name = named(key)
        if name not in wanted:
            problems["unexpected"].append(f"{key} in {file.name}")
        elif shape != wanted[name]:
            problems["wrong shape"].append(f"{key} in {file.name} is {shape}, needs {wanted[name]}")
        elif check_finite and tensor.is_floating_point() and not torch.isfinite(tensor).all():
            problems["not finite"].append(f"{key} in {file.name}")
        else:
            kind = dtype(name) if tensor.is_floating_point() else tensor.dtype
            copied = torch.empty(tensor.shape, dtype=kind, device=device).copy_(tensor)
            found[name] = copied if share is None else share.held(name, copied)
    for name, twin in shared.items():  # tied weights are stored once, under either name
        if name in found and twin not in found:
            found[twin] = found[name]
    missing = [name for name in wanted if name not in found]
    reported = " ".join(" ".join(p) for p in problems.values())
    problems = {"missing": [n for n in missing if n not in reported]} | problems
    if any(problems.values()):
        raise ModelLoadError(f"{folder} does not fit {type(module).__name__}: {_explain(problems)}")
    module.load_state_dict(found, assign=True)
    return module.requires_grad_(False).eval()


def rename_key(key: str, key_map: KeyMap) -> str:
    """Our name of a stored tensor."""
    if not isinstance(key_map, Mapping):
        return key_map(key)
    for old, new in key_map.items():
        if key.startswith(old):
            return new + key[len(old) :]
    return key


def _shared_names(module: nn.Module) -> dict[str, str]:
    """name -> another name of the same parameter, both ways."""
    by_identity: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        by_identity.setdefault(id(parameter), []).append(name)
    pairs = [names for names in by_identity.values() if len(names) > 1]
    return {a: b for names in pairs for a in names for b in names if a != b}


def _explain(problems: Mapping[str, list[str]]) -> str:
    parts: list[str] = []
    for kind, items in problems.items():
        if items:
            more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
            parts.append(f"{kind}: {', '.join(items[:SHOWN])}{more}")
    return "; ".join(parts)
