"""Several devices decode or encode one video: they share its rows of pixels, or the tiles it is cut into.

**Strips.** A decoder's input is cut along the height, a strip a device. What a convolution needs of the rows beyond its
strip (a halo) comes from the neighbours at the moment at which the module pads: padding at the picture's own border
stays padding, padding elsewhere becomes rows of a neighbour. So every output is the same sum of the same numbers as on
one device, whatever the depth of the network. Group norms are taken over all strips; attention over a picture reads the
keys and values of all strips. What is kept from frame to frame (Wan's cache) is kept strip by strip.

**Tiles.** Where a VAE cuts its input into tiles (`vae="tiled"`, and Hunyuan's parts of long videos), each device runs
its share of them, whole, and all blend the same tiles: bit for bit what one device makes.

Modules stay diffusers' own; what is put around them here is the forward of encoder and decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kinetoscope.core.errors import CompositionError
from kinetoscope.parallel.comm import all_gather, all_reduce, swap_rows, tell
from kinetoscope.parallel.groups import Group

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
HEIGHT = -2


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


class Strips(TorchFunctionMode):
    """While this is open, tensors [..., H, W] are strips of taller ones.

    Attributes:
        group: of the devices, the topmost strip first.
        rows: of each strip where the network began; deeper they are multiples or fractions of it.
        joined: whether a module works on all rows for the moment.
        picture: whether attention is over the tokens of a picture, row by row.
    """

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group
        self.rows: tuple[int, ...] = ()
        self.open = self.joined = self.picture = False

    @contextmanager
    def over(self, rows: Sequence[int]) -> Generator[None]:
        """Inside the `with`, tensors are strips of so many rows each."""
        self.rows, self.open = tuple(rows), True
        try:
            with self:
                yield
        finally:
            self.open = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """The function, with rows of the neighbours where it needs them."""
        given = dict(kwargs or {})
        replaced = None if self.joined else _REPLACED.get(func)
        return func(*args, **given) if replaced is None else replaced(self, func, *args, **given)

    def heights(self, own: int) -> list[int]:
        """Rows of all strips where this device's has `own`."""
        return [n * own // self.rows[self.group.index] for n in self.rows]

    def join(self, x: Tensor, dim: int = HEIGHT) -> Tensor:
        """All strips of `x`, below each other."""
        return join_uneven(x, self.heights(x.shape[dim]), self.group, dim)

    def own(self, x: Tensor) -> Tensor:
        """This device's strip of `x`, which has all rows."""
        parts = x.split([n * x.shape[HEIGHT] // sum(self.rows) for n in self.rows], HEIGHT)
        return parts[self.group.index]

    def border(self, x: Tensor, top: int, bottom: int, mode: str, value: float | None) -> Tensor:
        """`x` with `top` and `bottom` rows more: of the neighbours, or padding at the borders of the picture."""
        least = min(self.heights(x.shape[HEIGHT]))
        if least < max(top, bottom):
            raise CompositionError(f"parallel vae={self.group.size}: strips of {least} rows are too low; use fewer")
        above, below = swap_rows(x, self.group, top, bottom, HEIGHT)
        if top and above is None:
            above = _pad(x, (0, 0, top, 0), mode, value).narrow(HEIGHT, 0, top)
        if bottom and below is None:
            below = _pad(x, (0, 0, 0, bottom), mode, value).narrow(HEIGHT, x.shape[HEIGHT], bottom)
        return torch.cat([part for part in (above, x, below) if part is not None], HEIGHT)


def join_uneven(x: Tensor, sizes: Sequence[int], group: Group, dim: int) -> Tensor:
    """The parts of all processes joined along `dim`, where they have `sizes`."""
    most = max(sizes)
    short = most - x.shape[dim]
    if short:
        x = torch.cat([x, x.new_zeros(*x.shape[:dim], short, *x.shape[dim % x.ndim + 1 :])], dim)
    parts = all_gather(x, group, dim).split(most, dim)
    return torch.cat([part.narrow(dim, 0, n) for part, n in zip(parts, sizes, strict=True)], dim)


# -- what is done instead of torch's functions -------------------------------------------------------------------------


def _pad(x: Tensor, pad: Sequence[int], mode: str, value: float | None) -> Tensor:
    """Padding of the last axes; all modes but "constant" want them all named."""
    full = [*pad, *([0] * (2 * (x.ndim - 2) - len(pad)))] if mode != "constant" else pad
    return F.pad(x, full, mode, value)


def _padded(
    strips: Strips, func: Any, input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> Tensor:
    pad = list(pad)
    if len(pad) >= 4 and (pad[2] or pad[3]):
        if min(pad[2:4]) < 0:
            raise CompositionError("parallel vae: rows are cropped inside this VAE; decode on one device")
        input = strips.border(input, pad[2], pad[3], mode, value)
        pad[2] = pad[3] = 0
    return func(input, pad, mode, value) if any(pad) else input


def _convolved(
    strips: Strips, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **given: Any
) -> Tensor:
    names = ("stride", "padding", "dilation", "groups")
    options = dict(zip(names, rest, strict=False)) | given
    padding = options.get("padding", 0)
    if isinstance(padding, str):
        raise CompositionError(f"parallel vae: a convolution with padding={padding!r} is not shared")
    each = [padding] * (input.ndim - 2) if isinstance(padding, int) else list(padding)
    if each[HEIGHT]:
        input = strips.border(input, each[HEIGHT], each[HEIGHT], "constant", 0.0)
        each[HEIGHT] = 0
        options["padding"] = tuple(each)
    return func(input, weight, bias, **options)


def _normalized(
    strips: Strips,
    func: Any,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Group norm with the mean and variance over all strips: the sums of all, in two passes as torch's own."""
    x = input.float().unflatten(1, (num_groups, -1)).flatten(2)  # [B, G, n]
    total = x.shape[2] * sum(strips.rows) / strips.rows[strips.group.index]
    mean = all_reduce(x.sum(2, keepdim=True), strips.group) / total
    variance = all_reduce((x - mean).square().sum(2, keepdim=True), strips.group) / total
    result = ((x - mean) * torch.rsqrt(variance + eps)).view(input.shape).to(input.dtype)
    shape = (1, -1, *[1] * (input.ndim - 2))
    result = result if weight is None else result * weight.view(shape)
    return result if bias is None else result + bias.view(shape)


def _attended(strips: Strips, func: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **given: Any) -> Tensor:
    if not strips.picture:
        return func(query, key, value, *rest, **given)
    tokens = strips.heights(key.shape[-2])
    key, value = (join_uneven(x, tokens, strips.group, -2) for x in (key, value))
    return func(query, key, value, *rest, **given)


_REPLACED: dict[Any, Callable[..., Any]] = {
    F.pad: _padded,
    F.conv2d: _convolved,
    F.conv3d: _convolved,
    F.group_norm: _normalized,
    F.scaled_dot_product_attention: _attended,
}


# -- encoder and decoder -----------------------------------------------------------------------------------------------


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
        module.__dict__.pop("_conv_forward", None)  # `core.onednn`, which does not call `conv3d`
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
