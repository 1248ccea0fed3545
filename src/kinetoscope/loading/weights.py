"""Weights from safetensors into a module built on the meta device; nothing of a file that does not fit is read."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kinetoscope.core.errors import ModelLoadError
from kinetoscope.core.sharding import Cut, Share, take
from kinetoscope.loading.weight_files import weight_files
from kinetoscope.loading.weight_formats import UNQUANTIZED, describe_damage, describe_layout, quantization_of

SHOWN = 4
"""Keys of each kind that an error names; the rest is counted."""

DtypePolicy = Callable[[str], torch.dtype]
PACKED = ("F8_E8M0", "F4", "F6_E2M3", "F6_E3M2")
"""Types of safetensors that hold scales, or less than a byte a number."""
KeyMap = Mapping[str, str] | Callable[[str], str]


class Header(NamedTuple):
    """What a file's header says of one tensor; `dtype` in the words of safetensors ("F32", "F8_E4M3", ...)."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


@contextmanager
def opened(file: Path) -> Generator[Any]:
    """Open a safetensors file.

    Raises:
        ModelLoadError: the file is cut, or is something else (the message says what).
    """
    try:
        with safe_open(file, "pt", device="cpu") as content:
            yield content
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(describe_damage(file)) from error


def read_headers(files: list[Path]) -> dict[str, Header]:
    """Return key -> header of the tensors of all files; nothing else of the files is read.

    Raises:
        ModelLoadError: a file is truncated or is not safetensors, or two files hold the same key.
    """
    found: dict[str, Header] = {}
    for file in files:
        with opened(file) as content:
            for key in content.keys():  # noqa: SIM118 - not a mapping
                if key in found:
                    raise ModelLoadError(
                        f"{file.parent}: {key} is in {found[key].file.name} and in {file.name}; download the model "
                        "again"
                    )
                part = content.get_slice(key)
                found[key] = Header(file, tuple(part.get_shape()), str(part.get_dtype()))
    return found


def tensor_shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Return key -> shape of the tensors of all files, from their headers alone.

    Raises:
        ModelLoadError: see `read_headers`.
    """
    return {key: header.shape for key, header in read_headers(files).items()}


class Stored(NamedTuple):
    """A tensor of a file.

    Attributes:
        file, key: where the tensor is.
        shape: shape of the whole tensor.
        tensor: the part of the tensor that was asked for.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    tensor: Tensor


def read_tensors(files: list[Path], cuts: Callable[[str], Sequence[Cut]] | None = None) -> Iterator[Stored]:
    """Read all tensors of all files, one at a time.

    Args:
        files: the files, in the order of reading.
        cuts: key -> the part to read; nothing else of the tensor comes into memory. None: all of each.

    Raises:
        ModelLoadError: a file is truncated or is not safetensors.
    """
    for file in files:
        with opened(file) as content:
            for key in content.keys():  # noqa: SIM118 - not a mapping
                stored, wanted = content.get_slice(key), cuts(key) if cuts else ()
                shape = tuple(stored.get_shape())
                fits = all(cut.dim < len(shape) for cut in wanted)  # else the caller refuses it by its shape
                part = take(stored, shape, wanted) if wanted and fits else content.get_tensor(key)
                yield Stored(file, key, shape, part)


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
        ModelLoadError: see `weight_files`, `read_headers` and `check_headers`; or tensors that are not finite.
    """
    files = weight_files(folder)
    named = partial(rename_key, key_map=key_map or {})
    check_headers(module, folder, read_headers(files), named)
    shared = _shared_names(module)
    found: dict[str, Tensor] = {}
    broken: list[str] = []
    for file, key, _, tensor in read_tensors(files, None if share is None else lambda key: share.cuts(named(key))):
        name = named(key)
        if check_finite and not is_finite(tensor):
            broken.append(f"{key} in {file.name}")
            continue
        kind = dtype(name) if tensor.is_floating_point() else tensor.dtype
        copied = torch.empty(tensor.shape, dtype=kind, device=device).copy_(tensor)
        found[name] = copied if share is None else share.held(name, copied)
    if broken:
        raise _misfit(module, folder, {"not finite": broken})
    for name, twin in shared.items():  # tied weights are stored once, under either name
        if name in found and twin not in found:
            found[twin] = found[name]
    module.load_state_dict(found, assign=True)
    return module.requires_grad_(False).eval()


def check_headers(
    module: nn.Module, folder: Path, headers: Mapping[str, Header], named: Callable[[str], str] = str
) -> None:
    """Refuse files that do not hold the tensors of `module`, before any of them is read.

    Args:
        module: its parameters and buffers are what the files should hold; it may be on the meta device.
        folder: the component's folder, for messages.
        headers: the tensors that the files hold.
        named: stored key -> our name.

    Raises:
        ModelLoadError: quantized weights; missing, unexpected, doubled or wrongly shaped tensors, each named with its
            file.
    """
    wanted = module.state_dict()
    shared = _shared_names(module)
    held: dict[str, str] = {}
    unknown: list[str] = []
    problems: dict[str, list[str]] = {"missing": [], "unexpected": [], "wrong shape": [], "twice": [], "integers": []}
    for key, header in headers.items():
        name, at = named(key), f"{key} in {header.file.name}"
        if name not in wanted:
            unknown.append(key)
            problems["unexpected"].append(at)
        elif name in held:
            problems["twice"].append(f"{at} and {held[name]}")
        elif header.shape != tuple(wanted[name].shape):
            problems["wrong shape"].append(f"{at} is {header.shape}, needs {tuple(wanted[name].shape)}")
        elif wanted[name].is_floating_point() and header.dtype[:1] in "IU":
            problems["integers"].append(f"{at} is {header.dtype}")
        held.setdefault(name, key)
    check_unquantized(folder, headers, unknown)
    problems["missing"] = [n for n in wanted if n not in held and shared.get(n) not in held]
    if any(problems.values()):
        raise _misfit(module, folder, problems, describe_layout(unknown))


def check_unquantized(folder: Path, headers: Mapping[str, Header], unknown: Iterable[str] = ()) -> None:
    """Refuse weights that are stored with scales or codes, which alone would be other weights.

    Float8 weights without scales are plain numbers, and are taken.

    Args:
        folder: the component's folder, for messages.
        headers: the tensors that its files hold.
        unknown: those of them that the model has no parameter for.

    Raises:
        ModelLoadError: names the kind and a key that shows it.
    """
    found = quantization_of(unknown)
    if found is None:
        small = next((k for k, h in headers.items() if h.dtype in PACKED), None)
        found = small and (f"weights in {headers[small].dtype}, which need scales", small)
    if found:
        kind, key = found
        raise ModelLoadError(f"{folder} holds {kind} ({key} in {headers[key].file.name}); {UNQUANTIZED}")


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor infinity; integers never do."""
    if not tensor.is_floating_point():
        return True
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # float8 has no such test
    return bool(torch.isfinite(wide).all())


def _misfit(
    module: nn.Module, folder: Path, problems: Mapping[str, list[str]], hint: str | None = None
) -> ModelLoadError:
    more = f"; {hint}" if hint else ""
    return ModelLoadError(f"{folder} does not fit {type(module).__name__}: {_explain(problems)}{more}")


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
