"""Sparse-linear attention, SLA (arXiv 2509.24006): the best blocks exactly, all of it once more by linear attention."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kinetoscope.attention.parameters import Parameters
from kinetoscope.attention.sparse.base import SparseAttention, Trained, attend_by, others_of
from kinetoscope.attention.sparse.context import AttentionContext
from kinetoscope.attention.sparse.reference import sla_linear, sla_mask
from kinetoscope.attention.sparse.tiles import Triple, tile_layout


class SparseLinearAttention(SparseAttention):
    """`sla:sparsity=0.9,query_block=128,key_block=64`: blocks are runs of tokens in the order of the grid.

    Each block of queries sees the share 1 - sparsity of key blocks whose means match its own best, k taken less its
    mean. As in the published code, linear attention over all keys is added through a projection that training starts at
    zero; a model without one has the exact part alone.
    """

    kind: ClassVar[str] = "sla"
    lossy: ClassVar[str] = "of the blocks of keys only the best few are seen (arXiv 2509.24006)"
    kernels: ClassVar[tuple[str, ...]] = ("blocks", "flex", "reference")

    def read(self, given: Parameters) -> None:
        """`sparsity` and the sizes of blocks."""
        self.sparsity = given.number("sparsity", 0.9, 0, 1)
        self.query_block = given.whole("query_block", 128, 1)
        self.key_block = given.whole("key_block", 64, 1)

    def tile(self, grid: Triple, layer: int) -> Triple:
        """None of its own: blocks are runs of tokens."""
        return grid

    def _kept(self, context: AttentionContext) -> int:
        return context.kept(self.sparsity, -(-context.layout.tokens // self.key_block))

    def attend(self, context: AttentionContext, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None) -> Tensor:
        """By blocks."""
        tokens = context.layout.tokens
        line: Triple = (tokens, 1, 1)
        mine = tile_layout(line, (self.query_block, 1, 1), q.device)
        theirs = tile_layout(line, (self.key_block, 1, 1), q.device)
        keys = theirs.split(k[:, :tokens])
        with torch.no_grad():
            # It moves all scores of a query block alike, so it decides ties of rounding alone.
            centre = k[:, :tokens].float().mean(1)[:, :, None]  # [R, H, 1, D]
            scores = mine.mean(mine.split(q)) @ (theirs.mean(keys) - centre).transpose(2, 3)  # [R, H, T, U]
            index = scores.topk(self._kept(context), dim=-1, sorted=False).indices
        bias = theirs.key_bias(None if key_bias is None else key_bias[:, :tokens])
        others = others_of(k, v, key_bias, tokens)
        values = theirs.split(v[:, :tokens])
        return mine.join(attend_by(self.kernel, mine.split(q), keys, values, bias, index, others))

    def add_rest(
        self, context: AttentionContext, out: Tensor, q: Tensor, k: Tensor, v: Tensor, trained: Trained
    ) -> Tensor:
        """O = O_s + proj(O_l)."""
        if trained.project is None:
            return out
        linear = (sla_linear if self.kernel == "reference" else linear_part)(q, k, v)
        return out + trained.project(linear)

    def mask(self, context: AttentionContext, q: Tensor, k: Tensor) -> Tensor:
        """From means taken block by block."""
        return sla_mask(q, k, self.query_block, self.key_block, self._kept(context))


def linear_part(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear attention with softmax over channels as the feature map, before the projection: [R, N, H, D]."""
    a, b = q.float().softmax(-1), k.float().softmax(-1)
    state = torch.einsum("rmhd,rmhc->rhdc", b, v.float())
    total = torch.einsum("rnhd,rhd->rnh", a, b.sum(1)) + 1e-5
    return (torch.einsum("rnhd,rhdc->rnhc", a, state) / total.unsqueeze(-1)).to(q.dtype)
