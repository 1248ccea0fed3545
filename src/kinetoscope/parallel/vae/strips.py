"""A picture cut along its height: what layers need of the rows beyond a device's strip comes from its neighbours."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kinetoscope.core.errors import CompositionError
from kinetoscope.parallel.comm import all_gather, all_reduce, swap_rows
from kinetoscope.parallel.groups import Group

HEIGHT = -2


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
