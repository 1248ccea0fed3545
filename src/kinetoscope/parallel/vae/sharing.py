"""An encoder or decoder run in strips or tile by tile, around diffusers' own modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinetoscope.core.errors import CompositionError
from kinetoscope.parallel.comm import all_gather, tell
from kinetoscope.parallel.groups import Group
from kinetoscope.parallel.vae.strips import HEIGHT, Strips

SHARED = (
    "AutoencoderKLWan",
    "AutoencoderKLHunyuanVideo",
    "AutoencoderKLHunyuanVideo15",
    "AutoencoderKLLTXVideo",
    "AutoencoderKLCosmos",
)
"""Classes whose layers are known to be of the kinds below."""
JOINED = ("HunyuanVideoMidBlock3D", "HunyuanVideo15AttnBlock")
"""Modules that attend over frames and rows at once: each device runs them over all rows."""
PICTURES = ("WanAttentionBlock",)
"""Modules that attend within a picture, their tokens in rows: each device has the queries of its rows."""
PICTURE_PROCESSOR = "CosmosSpatialAttentionProcessor2_0"
CUT = ("use_tiling", "use_framewise_encoding", "use_framewise_decoding")
"""Attributes of a VAE that cuts its input into tiles, or a long video into parts."""


def check_shared(class_name: str, config: Mapping[str, Any]) -> None:
    """Refuse a VAE that devices cannot share.

    Args:
        class_name: of diffusers.
        config: its config.json.

    Raises:
        CompositionError: names it.
    """
    if class_name not in SHARED:
        known = ", ".join(SHARED)
        raise CompositionError(f"parallel vae and {class_name} cannot be used together: devices share {known}")
    noisy = config.get("decoder_inject_noise", False)
    if class_name == "AutoencoderKLLTXVideo" and any(noisy if isinstance(noisy, (list, tuple)) else [noisy]):
        raise CompositionError(
            "parallel vae and AutoencoderKLLTXVideo with decoder_inject_noise cannot be used together: it draws noise "
            "as it decodes, which every device would draw for its own part"
        )


def share_vae(vae: Any, group: Group) -> None:
    """Let the devices of `group` share what this VAE encodes and decodes; all of them call it alike from now on.

    Args:
        vae: of one of the classes in `SHARED`, loaded on each of them.

    Raises:
        CompositionError: see `check_shared`.
    """
    if group.size == 1:
        return
    check_shared(type(vae).__name__, vae.config)
    strips = Strips(group)
    for module in vae.modules():
        _adapt(module, strips)
    total = _spatial(vae)
    for name, unit in (("encoder", total), ("decoder", 1)):
        part = _Part(strips, getattr(vae, name), unit, _fake(vae, name, total))
        getattr(vae, name).forward = part.forward
        method = f"_{name.removesuffix('r')}"  # _encode, _decode
        if hasattr(vae, "use_tiling"):
            setattr(vae, method, MethodType(_shared_tiles(getattr(type(vae), method), part), vae))


@dataclass
class _Call:
    """One call of a decoder or encoder, remembered to be made later."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def tile(self) -> int:
        """What calls of one tile have in common: the cache they share, or nothing."""
        return id(self.kwargs.get("feat_cache") or self)


@dataclass
class _Part:
    """An encoder or decoder, and how it is run: in strips, or remembering tiles, or giving back their results.

    Attributes:
        unit: rows of its input that stay together.
        fake: what stands for the result of a tile that is only remembered.
    """

    strips: Strips
    module: nn.Module
    unit: int
    fake: Callable[[Tensor], Tensor]
    calls: list[_Call] | None = None
    results: list[Tensor] = field(default_factory=list[Tensor])

    def __post_init__(self) -> None:
        self.run: Callable[..., Tensor] = self.module.forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the module's own, on all devices of the group alike."""
        if self.calls is not None:
            self.calls.append(_Call((x, *args), kwargs))
            return self.fake(x)
        if self.results:
            return self.results.pop(0)
        parts, left = divmod(x.shape[HEIGHT], self.unit)
        size = self.strips.group.size
        if left or parts < size or self.strips.open:  # too low to share: each does it alone
            return self.run(x, *args, **kwargs)
        rows = [(parts // size + (i < parts % size)) * self.unit for i in range(size)]
        with self.strips.over(rows):
            self.strips.joined = True
            own = self.strips.own(x).contiguous()
            self.strips.joined = False
            out = self.run(own, *args, **kwargs)
            self.strips.joined = True
            try:
                return self.strips.join(out)
            finally:
                self.strips.joined = False


def _shared_tiles(method: Callable[..., Any], part: _Part) -> Callable[..., Any]:
    """`_encode` or `_decode` of a VAE whose tiles, if it has enough, are shared out."""

    def shared(vae: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(getattr(vae, name, False) for name in CUT):
            return method(vae, *args, **kwargs)
        part.calls = []
        try:
            method(vae, *args, **kwargs)  # nothing is computed: what would be, is remembered
        finally:
            calls, part.calls = part.calls, None
        tiles: dict[int, list[int]] = {}
        for number, call in enumerate(calls):
            tiles.setdefault(call.tile, []).append(number)
        if len(tiles) >= part.strips.group.size:
            part.results = _run_tiles(part, calls, list(tiles.values()))
        try:
            return method(vae, *args, **kwargs)
        finally:
            part.results = []

    return shared


def _run_tiles(part: _Part, calls: list[_Call], tiles: list[list[int]]) -> list[Tensor]:
    """The results of all calls, each made by one device; of the tiles the largest are given out first."""
    group = part.strips.group
    cost = [sum(calls[n].args[0].numel() for n in tile) for tile in tiles]
    load = [0] * group.size
    owner: dict[int, int] = {}
    for index in sorted(range(len(tiles)), key=lambda i: -cost[i]):
        owner[index] = load.index(min(load))
        load[owner[index]] += cost[index]
    made: dict[int, Tensor] = {}
    for index, tile in enumerate(tiles):
        for number in tile:
            call = calls[number]
            if owner[index] == group.index:
                made[number] = part.run(*call.args, **call.kwargs)
        for number in tile:
            calls[number] = _Call((), {})  # lets its cache go
    return _exchange(made, group)


def _exchange(made: Mapping[int, Tensor], group: Group) -> list[Tensor]:
    """The tensors of all devices in the order of their numbers."""
    shapes = tell({n: tuple(x.shape) for n, x in made.items()}, group)
    sizes = [sum(torch.Size(s).numel() for s in of.values()) for of in shapes]
    flat = torch.cat([x.flatten() for x in made.values()])
    flat = F.pad(flat, (0, max(sizes) - flat.numel()))
    result: dict[int, Tensor] = {}
    for of, buffer in zip(shapes, all_gather(flat, group, 0).split(max(sizes)), strict=True):
        start = 0
        for number, shape in of.items():
            end = start + torch.Size(shape).numel()
            result[number] = buffer[start:end].view(shape)
            start = end
    return [result[n] for n in sorted(result)]


def _adapt(module: nn.Module, strips: Strips) -> None:
    """Put around a module what it needs to work on strips."""
    name = type(module).__name__
    if isinstance(module, nn.Conv3d) and module.padding_mode == "zeros" and module.padding[HEIGHT]:
        _call_conv3d(module, strips)
    processor = type(getattr(module, "processor", None)).__name__
    if name in JOINED:
        forward = module.forward

        def joined(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not strips.open or strips.joined:
                return forward(x, *args, **kwargs)
            strips.joined = True
            try:
                return strips.own(forward(strips.join(x), *args, **kwargs))
            finally:
                strips.joined = False

        module.forward = joined  # pyright: ignore[reportAttributeAccessIssue] - Conv3d's argument has another name
    elif name in PICTURES or processor == PICTURE_PROCESSOR:
        plain = module.forward

        def picture(*args: Any, **kwargs: Any) -> Tensor:
            strips.picture = True
            try:
                return plain(*args, **kwargs)
            finally:
                strips.picture = False

        module.forward = picture


def _call_conv3d(layer: nn.Conv3d, strips: Strips) -> None:
    """Over strips a layer calls `conv3d`, which `core.onednn` does not; elsewhere it stays as it was, bit for bit."""
    own = layer.__dict__.get("_conv_forward")
    if own is None:
        return

    def convolved(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if strips.open and not strips.joined:
            return nn.Conv3d._conv_forward(layer, input, weight, bias)  # pyright: ignore[reportPrivateUsage]
        return own(input, weight, bias)

    layer._conv_forward = convolved  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]


def _spatial(vae: Any) -> int:
    """Rows that the encoder makes one of; Wan 2.2's pixels are folded into channels before it."""
    config = vae.config
    names = ("scale_factor_spatial", "spatial_compression_ratio")
    found = next((v for n in names if (v := config.get(n)) is not None), None)
    ratio = int(found or vae.spatial_compression_ratio)
    folded = type(vae).__name__ == "AutoencoderKLWan" and config.get("patch_size")
    return ratio // int(folded or 1)


def _fake(vae: Any, name: str, total: int) -> Callable[[Tensor], Tensor]:
    """Stands for a tile: small, of the channels that follow, and of one shape for inputs of one shape."""
    if name == "decoder":
        channels = int(vae.config.get("out_channels", 3))
    else:
        follows = getattr(vae, "quant_conv", None)
        channels = int(getattr(follows, "in_channels", None) or 1)

    def make(x: Tensor) -> Tensor:
        height, width = (max(1, n // total) if name == "encoder" else n for n in x.shape[-2:])
        return x.new_zeros(x.shape[0], channels, x.shape[2], height, width)

    return make
