"""Tensor parallel (arXiv 1909.08053): each device holds some heads and some of the feed-forward layer's hidden units.

Which layer is shared out how is data of a family, pattern -> style; here the patterns are laid over a model, strictly:
each parameter is under one pattern, and each pattern has something under it. A plan that says too little would run, and
be wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor.placement_types import (
    _StridedShard,  # pyright: ignore[reportPrivateUsage] - torch's only word for several layers side by side
)

from kinetoscope.core.errors import ConfigError
from kinetoscope.core.sharding import Cut, spans_of, take
from kinetoscope.parallel.groups import Group
from kinetoscope.parallel.tensor import layers


@dataclass(frozen=True, slots=True)
class Style:
    """What becomes of a layer.

    Attributes:
        of: kinds of layers that it is for.
        cuts: parameter of the layer -> dimension that is shared out.
        becomes: class that the layer takes on.
        says: for messages and documents.
    """

    of: tuple[type[nn.Module], ...]
    cuts: Mapping[str, int]
    becomes: type[nn.Module] | None
    says: str


STYLES: dict[str, Style] = {
    "colwise": Style((nn.Linear,), {"weight": 0, "bias": 0}, layers.ColumnLinear, "some of the outputs"),
    "gathered": Style((nn.Linear,), {"weight": 0, "bias": 0}, layers.GatheredLinear, "computes some, gathers all"),
    "rowwise": Style((nn.Linear,), {"weight": 1}, layers.RowLinear, "some of the inputs; sums"),
    "head_norm": Style((nn.RMSNorm,), {"weight": 0}, layers.SharedRMSNorm, "RMS norm over all devices' heads"),
    "vocabulary": Style((nn.Embedding,), {"weight": 0}, layers.VocabularyEmbedding, "some of the words; sums"),
    "columns": Style((nn.Embedding,), {"weight": 1}, layers.ColumnEmbedding, "some of the columns of a table"),
    "rotation": Style((nn.Module,), {}, None, "the second argument cut to the columns of this device's heads"),
    "heads": Style((nn.Module,), {}, None, "the number of heads, `n_heads`, is of this device"),
    "whole": Style((nn.Module,), {}, None, "every device has all of it"),
}
"""`name` or `name:parts`, for layers that are several side by side (queries, keys and values in one)."""


def apply_plan(module: nn.Module, styles: Mapping[str, str], group: Group, mesh: DeviceMesh) -> dict[str, Cut]:
    """Share a model's weights out, where it stands: on the meta device, before it is loaded, or with its weights.

    Args:
        module: the model.
        styles: pattern of names -> style; see `core.sharding.ShardPlan`.
        group: who shares.
        mesh: the same processes, for DTensors.

    Returns:
        Parameter -> what this process has of it, where it is not all.

    Raises:
        ConfigError: a parameter under no pattern or several, a pattern with nothing under it, an unknown style or one
            for another kind of layer, or sizes that do not divide; each named.
    """
    if reason := misfit(module, styles, group.size):
        raise ConfigError(f"plan of {type(module).__name__}: {reason}")
    if group.size == 1:
        return {}
    chosen = _cover(module, styles)
    cuts: dict[str, Cut] = {}
    tied: dict[int, nn.Parameter] = {}
    for path, text in chosen.items():
        name, _, parts = text.partition(":")
        cuts |= _apply(module, path, STYLES[name], int(parts or 1), group, mesh, tied)
    return cuts


def misfit(module: nn.Module, styles: Mapping[str, str], devices: int) -> str | None:
    """What of a model does not divide by a number of devices, or None.

    Raises:
        ConfigError: the plan does not fit the model; see `apply_plan`.
    """
    for path, text in _cover(module, styles).items():
        name, _, parts = text.partition(":")
        found = module.get_submodule(path)
        if not isinstance(found, STYLES[name].of):
            wanted = " or ".join(kind.__name__ for kind in STYLES[name].of)
            raise ConfigError(f"plan of {type(module).__name__}: {path} is a {type(found).__name__}, not a {wanted}")
        layer: Any = found
        if name == "heads" and layer.n_heads % devices:
            return f"{path} has {layer.n_heads} heads, which tp={devices} does not divide"
        for leaf, dim in STYLES[name].cuts.items() if name != "vocabulary" else ():  # words need not come out even
            value: Tensor | None = getattr(layer, leaf)
            width = (
                _head_width(module, path, value.shape[dim] // int(parts or 1)) if value is not None and dim == 0 else 1
            )
            if value is not None and value.shape[dim] % (int(parts or 1) * width * devices):
                what = f"heads of {width}" if width > 1 else "columns"
                count = value.shape[dim] // int(parts or 1) // width
                return f"{path} has {count} {what}, which tp={devices} does not divide"
    return None


def shared_parameters(module: nn.Module, styles: Mapping[str, str]) -> dict[str, str]:
    """Parameter -> style by which devices share it, where they do: what `apply_plan` would cut.

    Raises:
        ConfigError: the plan does not fit the model; see `apply_plan`.
    """
    found: dict[str, str] = {}
    for path, text in _cover(module, styles).items():
        style = text.partition(":")[0]
        layer = module.get_submodule(path)
        found |= {f"{path}.{leaf}": style for leaf in STYLES[style].cuts if getattr(layer, leaf) is not None}
    return found


def _head_width(module: nn.Module, path: str, size: int) -> int:
    """Columns that stay together: a head's, where the layer above says how wide one is."""
    width = getattr(module.get_submodule(path.rpartition(".")[0]), "head_dim", 1)
    return width if isinstance(width, int) and size % width == 0 else 1


def _cover(module: nn.Module, styles: Mapping[str, str]) -> dict[str, str]:
    """Path of a module that is changed -> its style."""
    kind = type(module).__name__
    for style in styles.values():
        if style.partition(":")[0] not in STYLES:
            raise ConfigError(f"plan of {kind}: unknown style {style!r}; known: {', '.join(STYLES)}")
    paths = [path for path, _ in module.named_modules(remove_duplicate=False) if path]
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    patterns = {given: given.removesuffix("?") for given in styles}
    used: set[str] = set()
    for name in names:
        over = [g for g, p in patterns.items() if fnmatchcase(name, p) or fnmatchcase(name.rpartition(".")[0], p)]
        if len(over) != 1:
            found = (
                f"under several entries: {', '.join(over)}"
                if over
                else "under no entry ('whole' if all should have it)"
            )
            raise ConfigError(f"plan of {kind}: {name} is {found}")
        used.add(over[0])
    chosen: dict[str, str] = {}
    for given, pattern in patterns.items():
        under = [path for path in paths if fnmatchcase(path, pattern)]
        if not under and given not in used and given == pattern:
            raise ConfigError(f"plan of {kind}: nothing is called {given!r}")
        if styles[given] != "whole":
            chosen |= dict.fromkeys(under, styles[given])
    return chosen


def _apply(
    module: nn.Module, path: str, style: Style, parts: int, group: Group, mesh: DeviceMesh, tied: dict[int, Any]
) -> dict[str, Cut]:
    layer: Any = module.get_submodule(path)
    cuts: dict[str, Cut] = {}
    for leaf, dim in style.cuts.items():
        parameter: nn.Parameter | None = getattr(layer, leaf)
        if parameter is None:
            continue
        cut = Cut(dim, group.index, group.size, parts)
        cuts[f"{path}.{leaf}"] = cut
        if id(parameter) not in tied:
            placement: Placement = Shard(dim) if parts == 1 else _StridedShard(dim, split_factor=parts)
            own = take(parameter.detach(), parameter.shape, [cut]).clone()
            tied[id(parameter)] = _parameter(own, mesh, placement, parameter)
        setattr(layer, leaf, tied[id(parameter)])
    if style.becomes is not None:
        _become(layer, style.becomes, group, parts)
    elif style is STYLES["rotation"]:
        layer.register_forward_pre_hook(partial(_cut_table, group))
    elif style is STYLES["heads"]:
        layer.n_heads //= group.size
    return cuts


def _parameter(own: Tensor, mesh: DeviceMesh, placement: Placement, whole: Tensor) -> nn.Parameter:
    part = DTensor.from_local(own, mesh, [placement], run_check=False, shape=whole.shape, stride=whole.stride())
    return nn.Parameter(part, requires_grad=whole.requires_grad)


def _cut_table(group: Group, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return layers.own_columns(module, args, group)


def _become(layer: Any, kind: type[nn.Module], group: Group, parts: int) -> None:
    layer.__class__ = kind
    layer.group = group
    if kind is layers.GatheredLinear:
        layer.parts = parts
    elif kind is layers.ColumnLinear:
        layer.out_features //= group.size
    elif kind is layers.RowLinear:
        layer.in_features //= group.size
    elif kind is layers.VocabularyEmbedding:
        spans = spans_of((layer.num_embeddings,), [Cut(0, group.index, group.size)])[0]
        layer.first = spans[0][0] if spans else layer.num_embeddings
