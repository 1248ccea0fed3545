"""LoRA files: read, checked against a model, and told in its parameter names."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinetoscope.core.errors import ConfigError, ModelLoadError, shown
from kinetoscope.core.files import name_problem
from kinetoscope.core.lora import Change, Full, LowRank
from kinetoscope.loading.directory import file_digest, read_json
from kinetoscope.loading.lora_keys import STYLES, TWO, Key, Names, Rename, parse_key, refused_kind
from kinetoscope.loading.not_models import INDEX, LORA_FILES
from kinetoscope.loading.weight_formats import describe_other_file
from kinetoscope.loading.weights import is_finite, opened, read_headers, read_tensors

SHOWN = 4
"""Keys that a message names; the rest is counted."""
PEFT_CONFIG = "adapter_config.json"
BOTH = "both"
"""Stands for both transformers of a model with two."""


@dataclass(frozen=True, slots=True)
class Target:
    """A transformer that a file may change.

    Attributes:
        shapes: of its parameters, by name.
        rename: a published name of a tensor -> its parameter, or the parameters that it joins.
    """

    shapes: Mapping[str, tuple[int, ...]]
    rename: Rename


@dataclass(frozen=True, slots=True, eq=False)
class LoraFile:
    """What a file changes.

    Attributes:
        path: the file, absolute.
        sha256: of the file (and of PEFT's configuration beside it).
        styles: whose key names it has.
        changes: component -> parameter -> changes.
        matched: keys that found their parameter.
        unmatched: keys that did not.
        ranks: of its low-rank changes, each once.
    """

    path: Path
    sha256: str
    styles: tuple[str, ...]
    changes: Mapping[str, Mapping[str, tuple[Change, ...]]]
    matched: int
    unmatched: tuple[str, ...]
    ranks: tuple[int, ...]


def read_lora(path: str | Path, targets: Mapping[str, Target], component: str | None = None) -> LoraFile:
    """Read a file and check it against a model.

    Args:
        path: a .safetensors file, or a folder in which PEFT or diffusers saved one.
        targets: the model's transformers: "transformer", and "transformer_2" where there are two.
        component: which of them a file changes that does not say so itself: one of them, or "both".

    Raises:
        ModelLoadError: the file is missing, damaged, of another kind (DoRA, ...), holds NaN or infinity, or fits the
            model in no key, or in its names but not in its shapes.
        ConfigError: `component` is needed, unknown, or contradicts the file.
    """
    file = _resolve(path)
    metadata = read_header(file)
    keys = _keys(file)
    scalings = {second: _scaling(file, metadata, second) for second in {key.second for key in keys}}
    places = _places(file, keys, targets, component)
    tensors = _read(file)
    changes: dict[str, dict[str, tuple[Change, ...]]] = {}
    used: set[str] = set()
    for second, components in places.items():
        layers: dict[str, dict[str, Key]] = {}
        for key in keys:
            if key.second == second and key.kind is not None:
                layers.setdefault(key.layer, {})[key.kind] = key
        for name in components if layers else ():
            finder = _Finder(file, tensors, scalings[second], targets[name])
            changes[name] = finder.changes(layers)
            used |= finder.used
    unmatched = tuple(text for text in tensors if text not in used)
    if len(unmatched) == len(tensors):
        raise ModelLoadError(
            f"{file}: no key belongs to this model; is the LoRA for another one? Its keys: {_some(unmatched)}. "
            f"Known styles: {STYLES}"
        )
    ranks = {c.down.shape[0] for part in changes.values() for cs in part.values() for c in cs if isinstance(c, LowRank)}
    styles = tuple(sorted({key.style for key in keys if key.text in used}))
    return LoraFile(file, lora_digest(file), styles, changes, len(used), unmatched, tuple(sorted(ranks)))


def lora_digest(path: str | Path) -> str:
    """SHA-256 (hex) of a LoRA file, with PEFT's configuration where there is one.

    Raises:
        ModelLoadError: there is no such file.
    """
    file = _resolve(path)
    config = file.parent / PEFT_CONFIG
    if not _has_config(file):
        return file_digest(file)
    return hashlib.sha256(f"{file_digest(file)}{file_digest(config)}".encode()).hexdigest()


def read_header(path: str | Path) -> dict[str, str]:
    """What the header of a LoRA file says beside its tensors.

    Raises:
        ModelLoadError: there is no such file, or it is damaged.
    """
    file = _resolve(path)
    with opened(file) as content:
        return dict(content.metadata() or {})


class _Finder:
    """Joins the tensors of each layer to changes of one transformer's parameters."""

    def __init__(self, file: Path, tensors: Mapping[str, Tensor], config: _Scaling, target: Target) -> None:
        self.file, self.tensors, self.config, self.target = file, tensors, config, target
        self.names = Names(target.shapes, target.rename)
        self.used: set[str] = set()

    def changes(self, layers: Mapping[str, Mapping[str, Key]]) -> dict[str, tuple[Change, ...]]:
        """Parameter -> changes, of all layers that the transformer has."""
        found: dict[str, tuple[Change, ...]] = {}
        for layer, keys in layers.items():
            for name, change in self._of_layer(layer, keys):
                found[name] = (*found.get(name, ()), change)
        return found

    def _of_layer(self, layer: str, keys: Mapping[str, Key]) -> list[tuple[str, Change]]:
        made: list[tuple[str, Change]] = []
        scale = 1.0
        low = [kind for kind in keys if kind.startswith(("down", "up")) and kind != "up_bias"]
        if low and (names := self.names.find(layer, "down")):
            down, up = self._both(keys)
            scale = self._scale(layer, keys, down.shape[0])
            self._check_pair(keys, names, down, up)
            for name, part in zip(names, self._parts(up, names), strict=True):
                made.append((name, LowRank(down, part, scale)))
            self._use(keys, *low, "alpha", "alpha_scale")
        for kind in ("diff", "diff_b", "diff_m", "up_bias"):
            if kind in keys and (names := self.names.find(layer, kind)):
                value, needed = self.tensors[keys[kind].text], self._joined(names)
                if _squeezed(value.shape) != _squeezed(needed):
                    raise self._misfit(keys[kind].text, value.shape, names, needed)
                for name, part in zip(names, self._parts(value, names), strict=True):
                    made.append((name, Full(part, scale if kind == "up_bias" else 1.0)))
                self._use(keys, kind, "alpha")  # an alpha without a rank scales nothing
        return made

    def _joined(self, names: Sequence[str]) -> tuple[int, ...]:
        """The shape of parameters joined along their first axis."""
        shapes = [self.target.shapes[name] for name in names]
        return (sum(s[0] for s in shapes), *shapes[0][1:])

    def _parts(self, value: Tensor, names: Sequence[str]) -> Sequence[Tensor]:
        """The rows of `value` that belong to each parameter."""
        return [value] if len(names) == 1 else value.split([self.target.shapes[name][0] for name in names])

    def _both(self, keys: Mapping[str, Key]) -> tuple[Tensor, Tensor]:
        blocks = [kind for i in range(len(keys)) if (kind := f"up.{i}") in keys]
        ups = blocks or [kind for kind in keys if kind == "up"]
        for there, lacking in ((["down"], ups), (ups, ["down"])):
            if there and there[0] in keys and not any(kind in keys for kind in lacking):
                raise ModelLoadError(f"{self.file}: {keys[there[0]].text} has no counterpart; download the file again")
        factors = [self.tensors[keys[kind].text] for kind in ups]
        if any(factor.ndim != 2 for factor in factors) and blocks:
            raise ModelLoadError(f"{self.file}: {keys[blocks[0]].text} and its like should be matrices")
        return self.tensors[keys["down"].text], torch.block_diag(*factors) if blocks else factors[0]

    def _scale(self, layer: str, keys: Mapping[str, Key], rank: int) -> float:
        for kind, divisor in (("alpha_scale", 1), ("alpha", rank)):
            if kind in keys:
                alpha = self.tensors[keys[kind].text]
                if alpha.numel() != 1:
                    raise ModelLoadError(f"{self.file}: {keys[kind].text} should be one number; it is {[*alpha.shape]}")
                return float(alpha.item()) / divisor
        return self.config.scale(layer, rank)

    def _check_pair(self, keys: Mapping[str, Key], names: Sequence[str], down: Tensor, up: Tensor) -> None:
        needed, a = self._joined(names), keys["down"].text
        b = next(key.text for kind, key in keys.items() if kind.startswith("up") and kind != "up_bias")
        if down.ndim < 2 or up.ndim < 2 or math.prod(up.shape[2:]) != 1 or up.shape[1] != down.shape[0]:
            raise ModelLoadError(
                f"{self.file}: {a} {[*down.shape]} and {b} {[*up.shape]} are not the two factors of one matrix"
            )
        if up.shape[0] != needed[0] or math.prod(down.shape[1:]) != math.prod(needed[1:]):
            product = (up.shape[0], *down.shape[1:])
            raise self._misfit(f"{a} with {b}", product, names, needed)

    def _misfit(self, key: str, shape: Sequence[int], names: Sequence[str], needed: Sequence[int]) -> ModelLoadError:
        return ModelLoadError(
            f"{self.file}: {key} changes a weight of shape {[*shape]}, but {' + '.join(names)} of this model is "
            f"{[*needed]}; the LoRA is for a model of another size"
        )

    def _use(self, keys: Mapping[str, Key], *kinds: str) -> None:
        self.used |= {keys[kind].text for kind in kinds if kind in keys}


class _Scaling:
    """What PEFT's configuration says of scales; without one they are 1."""

    def __init__(self, file: Path, config: Mapping[str, Any]) -> None:
        self.alpha: float | None = config.get("lora_alpha")
        self.patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
        self.rank_stabilized = bool(config.get("use_rslora"))
        if self.alpha is not None and not _is_number(self.alpha):
            raise ModelLoadError(f"{file}: lora_alpha={self.alpha!r} of its configuration is not a number")
        if not isinstance(self.patterns, Mapping) or not all(_is_number(a) for a in self.patterns.values()):
            raise ModelLoadError(f"{file}: alpha_pattern={self.patterns!r} should be layer names and their alphas")

    def scale(self, layer: str, rank: int) -> float:
        """alpha / r of a layer (arXiv 2312.03732's alpha / sqrt r where it was trained so)."""
        own = next((a for p, a in self.patterns.items() if re.fullmatch(rf"(.*\.)?({p})", layer)), self.alpha)
        if own is None:
            return 1.0
        return own / (math.sqrt(rank) if self.rank_stabilized else rank)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _resolve(path: str | Path) -> Path:
    file = Path(path).expanduser().absolute()
    if why := name_problem(file):
        raise ModelLoadError(f"there is no LoRA file {shown(str(path))}: {why}")
    if file.is_dir():
        inside = next((file / name for name in LORA_FILES if (file / name).is_file()), None)
        if inside is None and (file / INDEX).is_file():
            raise ModelLoadError(f"{file} is a model, not a LoRA, which changes one; give it as the model (--model)")
        if inside is None:
            raise ModelLoadError(f"{file} is a folder without {' or '.join(LORA_FILES)}; name the LoRA's file")
        return inside
    if not file.is_file():
        raise ModelLoadError(f"there is no LoRA file {file}")
    if file.suffix != ".safetensors":
        raise ModelLoadError(f"{file} is not a .safetensors file{describe_other_file(file)}")
    return file


def _keys(file: Path) -> list[Key]:
    """Return the keys of a file, from its header: a file that is no LoRA is refused before its tensors are read.

    Raises:
        ModelLoadError: the file is damaged, holds no tensors or whole weights, or is of a kind that is not supported.
    """
    headers = read_headers([file])
    keys = [parse_key(text) for text in headers]
    if not keys:
        raise ModelLoadError(f"{file} holds no tensors")
    for text, header in headers.items():
        if (kind := refused_kind(text)) is not None:
            raise ModelLoadError(f"{file}: {text} is of {kind}, which is not supported; only LoRA and plain deltas are")
        if header.dtype[:1] in "IUB" and header.dtype != "BF16" and not text.endswith(".alpha"):
            raise ModelLoadError(f"{file}: {text} has dtype {header.dtype}; a LoRA has floating-point numbers")
    if all(key.kind is None for key in keys):
        raise ModelLoadError(
            f"{file} holds no key of a LoRA ({_some(list(headers))}); whole weights are a model, which is given as the "
            f"model (--model) in diffusers layout. Keys of a LoRA are, for instance, {STYLES}"
        )
    return keys


def _read(file: Path) -> dict[str, Tensor]:
    """Read all tensors; each is finite."""
    tensors = {stored.key: stored.tensor for stored in read_tensors([file])}
    for key, value in tensors.items():
        if not is_finite(value):
            raise ModelLoadError(f"{file}: {key} holds NaN or infinity; the file is damaged or its training failed")
    return tensors


def _has_config(file: Path) -> bool:
    return file.name == LORA_FILES[0] and (file.parent / PEFT_CONFIG).is_file()


def _scaling(file: Path, metadata: Mapping[str, str], second: bool) -> _Scaling:
    """Return the scales of the keys of one transformer: PEFT's configuration lies beside its file, and diffusers writes
    one for each transformer into the header ("transformer.r", "transformer_2.r"; without a prefix: for both)."""
    config: dict[str, Any] = {}
    if _has_config(file):
        config = read_json(file.parent / PEFT_CONFIG)
    elif "lora_adapter_metadata" in metadata:
        try:
            told: dict[str, Any] = json.loads(metadata["lora_adapter_metadata"])
            plain = {name: value for name, value in told.items() if "." not in name}
            prefix = f"{TWO}." if second else "transformer."
            own = {name.removeprefix(prefix): value for name, value in told.items() if name.startswith(prefix)}
            config = {**plain, **own}
        except (ValueError, AttributeError) as error:
            raise ModelLoadError(f"{file}: lora_adapter_metadata in its header is not readable ({error})") from error
    if config.get("use_dora"):
        raise ModelLoadError(f"{file}: use_dora is set; DoRA is not supported")
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        raise ModelLoadError(f"{file}: peft_type={kind!r} of its configuration; only LORA is supported")
    return _Scaling(file, config)


def _places(
    file: Path, keys: Sequence[Key], targets: Mapping[str, Target], component: str | None
) -> dict[bool, tuple[str, ...]]:
    """Whether a key names the second transformer -> the transformers that it changes."""
    known = (*targets, BOTH) if len(targets) > 1 else tuple(targets)
    if component is not None and component not in known:
        raise ConfigError(f"{file}: this model has no component {component!r} for a LoRA; it has {', '.join(known)}")
    first = tuple(targets)[:1]
    if any(key.second for key in keys):
        if component is not None:
            raise ConfigError(
                f"{file} says itself which transformer each key changes; leave component={component!r} out"
            )
        return {False: first, True: (TWO,) if TWO in targets else ()}
    if len(targets) > 1 and component is None:
        raise ConfigError(
            f"{file} does not say which of this model's transformers it is for; give component="
            f"{' or '.join(repr(name) for name in known)} (the first is for high noise)"
        )
    return {False: tuple(targets) if component == BOTH else (component,) if component else first}


def _squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def _some(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join(keys[:SHOWN]) + more
