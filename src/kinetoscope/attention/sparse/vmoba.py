"""VMoBA (arXiv 2506.23858): every query picks chunks by their mean key; chunks are in time, space or both, by layer."""

from __future__ import annotations

import math
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from kinetoscope.attention.parameters import Parameters
from kinetoscope.attention.sparse.base import SparseAttention
from kinetoscope.attention.sparse.context import AttentionContext
from kinetoscope.attention.sparse.reference import vmoba_mask
from kinetoscope.attention.sparse.tiles import TileLayout, Triple

WHOLE = 2**31  # more than any axis has
MASKED_BELOW = 2**22  # pairs of a query and a key up to which one masked product is faster than one a head and chunk


class VideoMixtureOfBlocks(SparseAttention):
    """`vmoba:threshold=0.25,time=3,space=4,4,both=3,4,4`: sizes of chunks in tokens, for blocks 0, 1, 2, 3 (as 0), ...

    A query sees its own chunk and others: with `threshold`, the most similar pairs of a head's queries and chunks
    (`scope=head`), or of each query's chunks (`scope=query`), until their similarity reaches that share of the whole;
    with `sparsity` instead, the best share 1 - sparsity of chunks. Rows never share a choice.
    """

    kind: ClassVar[str] = "vmoba"
    lossy: ClassVar[str] = "of the chunks of keys each query sees the most similar (arXiv 2506.23858)"

    def read(self, given: Parameters) -> None:
        """`threshold` with `scope`, or `sparsity`; the sizes of chunks."""
        if given.has("threshold") and given.has("sparsity"):
            raise given.error("threshold and sparsity exclude each other; give one")
        sparsity = given.number("sparsity", 0, 0, 1)
        self.sparsity = sparsity if given.has("sparsity") else None
        self.threshold = given.number("threshold", 0.25, 0, 1)
        self.scope = given.choice("scope", ("head", "query"))
        time, (high, wide) = given.whole("time", 3, 1), given.sizes("space", (4, 4))
        self.cycle = ((time, WHOLE, WHOLE), (WHOLE, high, wide), cast(Triple, given.sizes("both", (3, 4, 4))))
        if self.sparsity is not None and given.has("scope"):
            raise given.error("scope belongs to threshold; with sparsity each query has as many chunks")
        if self.sparsity is None and self.schedule.ramp:
            raise given.error("ramp belongs to sparsity; a threshold has no density to ramp")

    def tile(self, grid: Triple, layer: int) -> Triple:
        """The chunks of a block: in time, in space, in both, and again."""
        t, h, w = self.cycle[layer % 3]
        return (min(t, grid[0]), min(h, grid[1]), min(w, grid[2]))

    def _count(self, context: AttentionContext) -> int | None:
        return None if self.sparsity is None else context.kept(self.sparsity, len(context.layout.sizes))

    def attend(self, context: AttentionContext, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None) -> Tensor:
        """By pairs of a head and a chunk, over the queries that picked it."""
        layout, tokens = context.layout, context.layout.tokens
        with torch.no_grad():
            picked = self._pick(layout, q, k[:, :tokens], self._count(context))  # [R, H, N, U]
        if picked.shape[:2].numel() * tokens * k.shape[1] <= MASKED_BELOW:
            return attend_masked(q, k, v, key_bias, layout, picked)
        return attend_picked(q, k, v, key_bias, layout, picked)

    def _pick(self, layout: TileLayout, q: Tensor, k: Tensor, count: int | None) -> Tensor:
        scores = q.transpose(1, 2).float() @ layout.mean(layout.split(k)).transpose(2, 3)  # [R, H, N, U]
        own = torch.zeros(scores.shape[2:], dtype=torch.bool, device=q.device)
        slots = layout.gather.shape[1]
        own[torch.arange(len(own), device=q.device), layout.position // slots] = True
        if count is not None:
            best = scores.topk(count, dim=-1, sorted=False).indices
            return torch.zeros_like(scores, dtype=torch.bool).scatter_(3, best, True) | own
        if self.scope == "query":
            return most_similar(scores, own, self.threshold) | own
        chosen = most_similar(scores.flatten(2), own.flatten(), self.threshold)
        return chosen.view(scores.shape) | own

    def mask(self, context: AttentionContext, q: Tensor, k: Tensor) -> Tensor:
        """Pair by pair."""
        tile = self.tile(context.grid, context.layer)
        count = self._count(context)
        return vmoba_mask(q, k, context.grid, tile, count=count, threshold=self.threshold, scope=self.scope)


def most_similar(scores: Tensor, own: Tensor, threshold: float) -> Tensor:
    """Of the last axis, those with the highest scores until their share reaches a threshold, own ones counted first.

    Shares are of scores scaled to [0, 1]. At least one that is not own is taken, as in the published code; at a
    threshold of 1 all are.

    Args:
        scores: [..., P].
        own: [..., P] bool, broadcast.

    Returns:
        [..., P] bool.
    """
    if threshold >= 1:
        return torch.ones_like(scores, dtype=torch.bool)
    low = scores.amin(-1, keepdim=True)
    span = scores.amax(-1, keepdim=True) - low
    share = (scores - low) / torch.where(span > 1e-6, span, 1.0)
    total = share.sum(-1, keepdim=True) + 1e-6
    missing = (threshold - (share * own).sum(-1, keepdim=True) / total).clamp(min=0)
    falling, order = share.masked_fill(own, 0.0).sort(dim=-1, descending=True)
    reached = falling.cumsum(-1) / total
    before = torch.cat([torch.full_like(missing, -math.inf), reached[..., :-1]], dim=-1)
    return torch.zeros_like(share, dtype=torch.bool).scatter_(-1, order, before < missing)


def attend_masked(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, layout: TileLayout, picked: Tensor
) -> Tensor:
    """As `attend_picked`, by one product of all pairs and a mask: for few tokens."""
    seen = picked[..., layout.position // layout.gather.shape[1]]  # [R, H, N, N]
    mask = torch.zeros(seen.shape, device=q.device).masked_fill(~seen, -math.inf)
    mask = F.pad(mask, (0, k.shape[1] - layout.tokens))
    if key_bias is not None:
        mask = mask + key_bias.float()[:, None, None]
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads, attn_mask=mask.to(q.dtype)).transpose(1, 2)


def attend_picked(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, layout: TileLayout, picked: Tensor
) -> Tensor:
    """Softmax attention of every query to the tiles it picked, and to the keys after the grid's.

    Args:
        q: [R, N, H, D].
        k, v: [R, N + others, H, D].
        key_bias: [R, N + others] float32, or None.
        layout: of the grid's tokens.
        picked: [R, H, N, U] bool.

    Returns:
        [R, N, H, D].
    """
    rows, tokens, heads, channels = q.shape
    keys, values = layout.split(k[:, :tokens]).float(), layout.split(v[:, :tokens]).float()
    bias = layout.key_bias(None if key_bias is None else key_bias[:, :tokens])
    done: list[Tensor] = []
    for row in range(rows):
        row_bias = None if bias is None else bias[row % len(bias)]
        more_bias = None if key_bias is None else key_bias[row, tokens:].float()
        for head in range(heads):
            query = q[row, :, head].float() * channels**-0.5  # [N, D]
            parts: list[tuple[Tensor | None, Tensor, Tensor]] = []  # queries that see it, logits, values
            for tile in range(keys.shape[2]):
                seen = picked[row, head, :, tile].nonzero().squeeze(1)
                logits = query[seen] @ keys[row, head, tile].T  # [P, B]
                parts.append((seen, logits if row_bias is None else logits + row_bias[tile], values[row, head, tile]))
            if k.shape[1] > tokens:
                logits = query @ k[row, tokens:, head].float().T
                more = logits if more_bias is None else logits + more_bias
                parts.append((None, more, v[row, tokens:, head].float()))
            done.append(_join_parts(query, parts))
    return torch.stack(done).view(rows, heads, tokens, channels).transpose(1, 2).to(q.dtype)


def _join_parts(query: Tensor, parts: list[tuple[Tensor | None, Tensor, Tensor]]) -> Tensor:
    """One softmax over parts of the keys, each seen by some queries (None: all): [N, D], joined by maxima and sums."""
    top = torch.full_like(query[:, 0], torch.finfo(query.dtype).min)
    with torch.no_grad():
        for seen, logits, _ in parts:
            here = slice(None) if seen is None else seen
            top[here] = torch.maximum(top[here], logits.amax(1))
    out, total = torch.zeros_like(query), torch.zeros_like(query[:, :1])
    for seen, logits, worth in parts:
        here = slice(None) if seen is None else seen
        weights = (logits - top[here].unsqueeze(1)).exp()
        share, weight = weights @ worth, weights.sum(1, keepdim=True)
        if seen is None:
            out, total = out + share, total + weight
        else:
            out, total = out.index_add(0, seen, share), total.index_add(0, seen, weight)
    return out / total
