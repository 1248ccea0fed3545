"""What the sparse kinds share: their call over a grid, dense steps, tokens outside the grid, the choice of kernel."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from kinetoscope.attention.default import default_attention
from kinetoscope.attention.flex import flex_takes, flex_tile_attention
from kinetoscope.attention.parameters import Parameters
from kinetoscope.attention.sparse.blocks import Others, attend_tiles
from kinetoscope.attention.sparse.context import AttentionContext, Schedule, attention_context
from kinetoscope.attention.sparse.reference import masked_attention
from kinetoscope.attention.sparse.tiles import Triple
from kinetoscope.core.context import current_context
from kinetoscope.core.errors import InputError

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Trained:
    """What a model trained with a kind has for it.

    Attributes:
        gate: [R, N, H, D] gates of the coarse attention of VSA.
        project: the projection of the linear attention of SLA, [..., D] -> [..., D].
    """

    gate: Tensor | None = None
    project: Callable[[Tensor], Tensor] | None = None


NOTHING_TRAINED = Trained()


def _uncompiled(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, at which a compiled region breaks."""
    return cast(Callable[P, T], torch.compiler.disable(function))


class SparseAttention(ABC):
    """A sparse kind with its settings. Calls of it over a grid are sparse; calls without one are dense.

    A kind that is approximated away at a step (`Schedule`) is computed by the default dense backend, so at full density
    it is dense attention bit for bit.

    Args:
        given: its parameters.

    Raises:
        ConfigError: a parameter is unknown or out of range.
    """

    kind: ClassVar[str]
    lossy: ClassVar[str]
    gated: ClassVar[bool] = False
    kernels: ClassVar[tuple[str, ...]] = ("blocks", "reference")
    ramps: ClassVar[bool] = True

    def __init__(self, given: Parameters) -> None:
        self.spec = given.spec
        self.schedule = Schedule.read(given, ramp=self.ramps)
        self.kernel = given.choice("kernel", self.kernels)
        self.read(given)
        given.finish()

    @abstractmethod
    def read(self, given: Parameters) -> None:
        """Read the parameters of the kind."""

    @abstractmethod
    def tile(self, grid: Triple, layer: int) -> Triple:
        """The tiles of a grid in a block of the transformer."""

    @abstractmethod
    def attend(self, context: AttentionContext, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None) -> Tensor:
        """The exact part: the grid's queries [R, N, H, D] over the keys [R, N + others, H, D] they see."""

    @abstractmethod
    def mask(self, context: AttentionContext, q: Tensor, k: Tensor) -> Tensor:
        """The keys that `attend` sees, written apart: q, k [R, N, H, D] -> [R or 1, H or 1, N, N] on the CPU."""

    def add_rest(
        self, context: AttentionContext, out: Tensor, q: Tensor, k: Tensor, v: Tensor, trained: Trained
    ) -> Tensor:
        """The exact part [R, N, H, D] with what the kind adds to it."""
        return out

    def refuse(self, device: str, dtype: torch.dtype) -> str | None:
        """Why it cannot serve on a device type in a dtype; None where it can."""
        if device != "cuda" and self.kernel in ("flex", "triton"):
            return f"kernel={self.kernel} is for CUDA; use kernel=blocks"
        if self.kernel == "triton" and find_spec("triton") is None:
            return "kernel=triton needs the package triton; pip install triton, or use kernel=blocks"
        return None

    def __str__(self) -> str:
        return self.spec

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, key_bias: Tensor | None = None) -> Tensor:
        """Dense attention, for calls without a grid; see `backends.math_attention`."""
        return default_attention(q, k, v, key_bias=key_bias)

    @_uncompiled
    def over_grid(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        key_bias: Tensor | None = None,
        grid: Triple,
        trained: Trained = NOTHING_TRAINED,
    ) -> Tensor:
        """Attention of the tokens of a video, and of those that follow them; see `attention`.

        A compiled region breaks here: what is computed depends on the step, and a graph of its own for every step
        would be compiled otherwise.

        Raises:
            InputError: there are fewer queries or keys than the grid has tokens.
        """
        tokens = math.prod(grid)
        if min(q.shape[1], k.shape[1]) < tokens:
            raise InputError(f"{self.kind} attention over a grid {grid} of {tokens} tokens got {q.shape[1]} queries "
                             f"and {k.shape[1]} keys")  # fmt: skip
        layer = attention_layer()
        context = attention_context(grid, self.tile(grid, layer), k.shape[1], self.schedule, q.device)
        video = (q[:, :tokens], k[:, :tokens], v[:, :tokens])
        if context.share == 0:
            out = default_attention(q, k, v, key_bias=key_bias)
            rest = None if q.shape[1] == tokens else out[:, tokens:]
            out = out if rest is None else out[:, :tokens]
        else:
            if self.kernel == "reference":
                mask = self.mask(context, *(x.detach().cpu() for x in video[:2])).to(q.device)
                out = masked_attention(video[0], k, v, mask, key_bias, context.others)
            else:
                out = self.attend(context, video[0], k, v, key_bias)
            rest = None
            if q.shape[1] > tokens:
                rest = default_attention(q[:, tokens:], k, v, key_bias=key_bias)
        out = self.add_rest(context, out, *video, trained)
        return out if rest is None else torch.cat([out, rest], dim=1)

    def _tiles(
        self, context: AttentionContext, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, index: Tensor
    ) -> Tensor:
        """Queries in the context's tiles over the key tiles in `index` [R or 1, H or 1, U, S], by the chosen kernel."""
        layout = context.layout
        tokens = layout.tokens
        q, keys, values = layout.split(q), layout.split(k[:, :tokens]), layout.split(v[:, :tokens])
        bias = layout.key_bias(None if key_bias is None else key_bias[:, :tokens])
        others = others_of(k, v, key_bias, tokens)
        return layout.join(attend_by(self.kernel, q, keys, values, bias, index, others))


def attention_layer() -> int:
    """Number of the transformer's block that is running."""
    context = current_context()
    return 0 if context is None else context.layer


def others_of(k: Tensor, v: Tensor, key_bias: Tensor | None, tokens: int) -> Others | None:
    """The keys after the first `tokens`."""
    if k.shape[1] == tokens:
        return None
    bias = None if key_bias is None else key_bias[:, tokens:]
    return Others(k[:, tokens:].transpose(1, 2), v[:, tokens:].transpose(1, 2), bias)


def attend_by(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, index: Tensor, others: Others | None
) -> Tensor:
    """`attend_tiles` by a kernel: "blocks", "flex" or "triton"; by "blocks" where the named one cannot.

    "flex" takes tiles of a multiple of 16 tokens and no keys outside the grid, "triton" has no gradient.
    """
    if kernel == "flex" and others is None and (q.device.type == "cpu" or flex_takes(q.shape[3], k.shape[3])):
        selected = torch.zeros(*index.shape[:2], q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        return flex_tile_attention(q, k, v, bias, selected.scatter_(3, index, True))
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if kernel == "triton" and not gradient:
        from kinetoscope.attention.sparse.triton_tiles import attend_tiles_triton

        return attend_tiles_triton(q, k, v, bias, index, others)
    return attend_tiles(q, k, v, bias, index, others)
