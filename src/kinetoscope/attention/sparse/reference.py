"""The sparse kinds as plain masks over all pairs of tokens: slow, written from the papers, the oracle of the rest.

Masks are [R or 1, H or 1, N, N] bool over the N = T H W tokens of a grid, True where the query sees the key.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from kinetoscope.attention.sparse.tiles import Triple


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, key_bias: Tensor | None = None, others: int = 0
) -> Tensor:
    """Softmax attention of the grid's queries with a mask over the grid's keys; `others` keys after them are all seen.

    Args:
        q: [R, N, H, D].
        k, v: [R, N + others, H, D].
        mask: [R or 1, H or 1, N, N] bool.
        key_bias: [R, N + others] float32, or None.

    Returns:
        [R, N, H, D] in the dtype of q.
    """
    logits = torch.einsum("rnhd,rmhd->rhnm", q.float(), k.float()) * q.shape[-1] ** -0.5
    if key_bias is not None:
        logits = logits + key_bias.float()[:, None, None]
    seen = torch.nn.functional.pad(mask, (0, others), value=True)
    return torch.einsum("rhnm,rmhd->rnhd", logits.masked_fill(~seen, -math.inf).softmax(-1), v.float()).to(q.dtype)


def tile_of(grid: Triple, tile: Triple) -> Tensor:
    """[N, 3] the tile of each token along time, height, width."""
    return torch.tensor([[p // s for p, s in zip(at, tile, strict=True)] for at in _places(grid)])


def members(grid: Triple, tile: Triple) -> list[list[int]]:
    """The tokens of each tile, tiles and tokens in the order of the grid."""
    found: dict[tuple[int, ...], list[int]] = {}
    for token, at in enumerate(_places(grid)):
        found.setdefault(tuple(p // s for p, s in zip(at, tile, strict=True)), []).append(token)
    return [found[key] for key in sorted(found)]


def _places(grid: Triple) -> itertools.product[tuple[int, int, int]]:
    return itertools.product(*(range(n) for n in grid))  # pyright: ignore[reportReturnType]


def sta_mask(grid: Triple, tile: Triple, window: Triple) -> Tensor:
    """Sliding tile attention (arXiv 2502.04507): a tile sees `window` tiles an axis around it, inside the grid."""
    own = tile_of(grid, tile)  # [N, 3]
    seen = torch.ones(1, 1, len(own), len(own), dtype=torch.bool)
    for axis in range(3):
        count = -(-grid[axis] // tile[axis])
        width = min(window[axis], count)
        first = (own[:, axis] - width // 2).clamp(0, count - width).unsqueeze(1)  # [N, 1]
        key = own[:, axis].unsqueeze(0)
        seen &= (first <= key) & (key < first + width)
    return seen


def means(x: Tensor, groups: list[list[int]]) -> Tensor:
    """Float32 means over groups of tokens: [R, N, H, D] -> [R, H, G, D]"""
    return torch.stack([x[:, group].float().mean(1) for group in groups], dim=2)


def best_groups(scores: Tensor, count: int, queries: list[list[int]], keys: list[list[int]]) -> Tensor:
    """Mask in which every group of queries sees the `count` groups of keys that score highest: [R, H, G, K] -> mask"""
    order = scores.argsort(dim=-1, descending=True)[..., :count].tolist()
    tokens = sum(map(len, keys))
    mask = torch.zeros(*scores.shape[:2], sum(map(len, queries)), tokens, dtype=torch.bool)
    for row, heads in enumerate(order):
        for head, groups in enumerate(heads):
            for number, chosen in enumerate(groups):
                for key in chosen:
                    mask[row, head][torch.tensor(queries[number])[:, None], torch.tensor(keys[key])] = True
    return mask


def vsa_mask(q: Tensor, k: Tensor, grid: Triple, tile: Triple, count: int) -> Tensor:
    """The tiles of video sparse attention (arXiv 2505.13389): `count` by the products of tile means."""
    groups = members(grid, tile)
    scores = torch.einsum("rhgd,rhkd->rhgk", means(q, groups), means(k, groups))
    return best_groups(scores, count, groups, groups)


def vsa_coarse(q: Tensor, k: Tensor, v: Tensor, grid: Triple, tile: Triple) -> Tensor:
    """O_c of video sparse attention: attention between tile means, for every token of the tile: [R, N, H, D]"""
    groups = members(grid, tile)
    scores = torch.einsum("rhgd,rhkd->rhgk", means(q, groups), means(k, groups)) * q.shape[-1] ** -0.5
    coarse = scores.softmax(-1) @ means(v, groups)  # [R, H, G, D]
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    for number, group in enumerate(groups):
        out[:, group] = coarse[:, :, number].unsqueeze(1)
    return out.to(q.dtype)


def sla_mask(q: Tensor, k: Tensor, query_block: int, key_block: int, count: int) -> Tensor:
    """The exact part of SLA (arXiv 2509.24006): `count` blocks of keys by block means, k less its mean."""
    tokens = range(q.shape[1])
    queries = [list(tokens[i : i + query_block]) for i in range(0, len(tokens), query_block)]
    keys = [list(tokens[i : i + key_block]) for i in range(0, len(tokens), key_block)]
    centred = k.float() - k.float().mean(1, keepdim=True)
    scores = torch.einsum("rhgd,rhkd->rhgk", means(q, queries), means(centred, keys))
    return best_groups(scores, count, queries, keys)


def sla_linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The linear part of SLA before its projection, softmax over channels as the feature map: [R, N, H, D]"""
    a, b = q.float().softmax(-1), k.float().softmax(-1)
    weights = torch.einsum("rnhd,rmhd->rhnm", a, b)
    total = weights.sum(-1, keepdim=True) + 1e-5
    return torch.einsum("rhnm,rmhd->rnhd", weights / total, v.float()).to(q.dtype)


def vmoba_mask(
    q: Tensor, k: Tensor, grid: Triple, tile: Triple, *, count: int | None, threshold: float, scope: str
) -> Tensor:
    """The chunks of VMoBA (arXiv 2506.23858): by the product of a query and the mean key of a chunk.

    A query sees its own chunk, and the `count` best (its own among them if it is); or, with `count` None, the best of
    all pairs of a head ("head") or of a query ("query") until their similarity, scaled to [0, 1], reaches `threshold`
    of the sum, the own chunk's counted first and one more pair in any case; a threshold of 1 is all of them.
    """
    groups = members(grid, tile)
    scores = torch.einsum("rnhd,rhkd->rhnk", q.float(), means(k, groups))  # [R, H, N, K]
    own = torch.zeros(q.shape[1], len(groups), dtype=torch.bool)
    for number, group in enumerate(groups):
        own[group, number] = True
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    for row, head in itertools.product(range(scores.shape[0]), range(scores.shape[1])):
        score = scores[row, head]  # [N, K]
        if count is not None:
            picked = torch.zeros_like(own)
            picked.scatter_(1, score.argsort(dim=1, descending=True)[:, :count], True)
        elif scope == "query":
            picked = torch.cat([_until(score[n : n + 1], own[n : n + 1], threshold) for n in range(len(score))])
        else:
            picked = _until(score, own, threshold)
        chosen[row, head] = picked | own
    mask = torch.zeros(*scores.shape[:2], q.shape[1], q.shape[1], dtype=torch.bool)
    for number, group in enumerate(groups):
        mask[..., group] = chosen[..., number : number + 1]
    return mask


def _until(score: Tensor, own: Tensor, threshold: float) -> Tensor:
    """Pairs [n, K] in falling order until their share of the sum, after that of own ones, reaches a threshold."""
    if threshold >= 1:
        return torch.ones_like(own)
    score = score.detach()
    span = float(score.max() - score.min())
    share = (score - score.min()) / (span if span > 1e-6 else 1.0)
    total = float(share.sum()) + 1e-6
    missing = max(0.0, threshold - float(share[own].sum()) / total)
    others = share.masked_fill(own, 0.0).flatten()
    picked = torch.zeros(others.shape, dtype=torch.bool)
    reached = 0.0
    for pair in others.argsort(descending=True).tolist():
        picked[pair] = True
        reached += float(others[pair]) / total
        if reached >= missing:
            break
    return picked.view(score.shape)
