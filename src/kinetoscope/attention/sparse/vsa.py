"""Video sparse attention, VSA (arXiv 2505.13389): attention between tile means says which tiles are attended to."""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from torch import Tensor

from kinetoscope.attention.parameters import Parameters
from kinetoscope.attention.sparse.base import SparseAttention, Trained
from kinetoscope.attention.sparse.context import AttentionContext
from kinetoscope.attention.sparse.reference import vsa_coarse, vsa_mask
from kinetoscope.attention.sparse.tiles import TileLayout, Triple


class VideoSparseAttention(SparseAttention):
    """`vsa:sparsity=0.8,tile=4,4,4`: each tile sees the share 1 - sparsity of tiles whose means match its own best.

    The sum of what the tiles see exactly and gate x attention between the means, for models with gates (FastWan);
    others have the exact part alone. A mean is over the tokens a tile really has.
    """

    kind: ClassVar[str] = "vsa"
    lossy: ClassVar[str] = "of the tiles of keys only the best few are seen (arXiv 2505.13389)"
    gated: ClassVar[bool] = True
    kernels: ClassVar[tuple[str, ...]] = ("blocks", "flex", "triton", "reference")

    def read(self, given: Parameters) -> None:
        """`sparsity` and `tile`."""
        self.sparsity = given.number("sparsity", 0.8, 0, 1)
        self.size = cast(Triple, given.sizes("tile", (4, 4, 4)))

    def tile(self, grid: Triple, layer: int) -> Triple:
        """The same in all blocks."""
        return self.size

    def attend(self, context: AttentionContext, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None) -> Tensor:
        """By tiles."""
        layout = context.layout
        with torch.no_grad():
            scores = tile_scores(layout, q, k[:, : layout.tokens])  # [R, H, U, U]
            index = scores.topk(context.kept(self.sparsity, len(layout.sizes)), dim=-1, sorted=False).indices
        return self._tiles(context, q, k, v, key_bias, index)

    def mask(self, context: AttentionContext, q: Tensor, k: Tensor) -> Tensor:
        """From means taken group by group."""
        return vsa_mask(q, k, context.grid, self.size, context.kept(self.sparsity, len(context.layout.sizes)))

    def add_rest(
        self, context: AttentionContext, out: Tensor, q: Tensor, k: Tensor, v: Tensor, trained: Trained
    ) -> Tensor:
        """O = O_s + gate O_c."""
        gate = trained.gate
        if gate is None:
            return out
        if self.kernel == "reference":
            return out + gate * vsa_coarse(q, k, v, context.grid, self.size)
        layout = context.layout
        weights = (tile_scores(layout, q, k) * q.shape[-1] ** -0.5).softmax(-1)
        coarse = (weights @ layout.mean(layout.split(v))).to(q.dtype)  # [R, H, U, D]
        slots = coarse.unsqueeze(3).expand(-1, -1, -1, layout.gather.shape[1], -1)
        return out + gate * layout.join(slots)


def tile_scores(layout: TileLayout, q: Tensor, k: Tensor) -> Tensor:
    """Float32 products of tile means: [R, N, H, D] twice -> [R, H, U, U]"""
    return layout.mean(layout.split(q)) @ layout.mean(layout.split(k)).transpose(2, 3)
