"""Exact attention of query tiles to the key tiles chosen for them, gathered: differentiable, on any device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

GATHERED_IN_CACHE = 2**18  # elements of keys that a CPU gathers at a time; more leave its cache before they are read
GATHERED = 2**26  # the same on other devices, so that a video's keys are not copied as often as they are seen at once


class Others(NamedTuple):
    """Keys outside the grid, which every query sees; heads before tokens."""

    keys: Tensor  # [R, H, E, D]
    values: Tensor  # [R, H, E, D]
    bias: Tensor | None  # [R, E] float32


def attend_tiles(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, index: Tensor, others: Others | None = None
) -> Tensor:
    """Softmax attention of every query tile to its own list of key tiles.

    Args:
        q: [R, H, T, B, D].
        k, v: [R, H, U, C, D].
        bias: [R or 1, U, C] float32 on the logits of keys, or None.
        index: [R or 1, H or 1, T, S] numbers of the key tiles, each at most once a list.
        others: keys that all queries see as well.

    Returns:
        [R, H, T, B, D].
    """
    rows, heads, tiles, size, channels = q.shape
    key_tiles, key_size = k.shape[2:4]
    chosen = index.shape[-1]
    index = index.expand(rows, heads, -1, -1)
    group = torch.arange(rows * heads, device=q.device).view(rows, heads, 1, 1) * key_tiles
    flat_k, flat_v = k.flatten(0, 2), v.flatten(0, 2)  # [R H U, C, D]
    gathered = GATHERED_IN_CACHE if q.device.type == "cpu" else GATHERED
    step = max(1, gathered // (rows * heads * chosen * key_size * channels))
    done: list[Tensor] = []
    for start in range(0, tiles, step):
        part = index[:, :, start : start + step]  # [R, H, t, S]
        count = part.shape[2]
        slots = (part + group).flatten()
        shape = (rows * heads, count, chosen * key_size, channels)
        keys, values = flat_k.index_select(0, slots).view(shape), flat_v.index_select(0, slots).view(shape)
        added = None if bias is None else _chosen_bias(bias, part).view(rows * heads, count, 1, -1)
        if others is not None:
            keys, values, added = _join_others(keys, values, added, others)
        queries = q[:, :, start : start + step].reshape(rows * heads, count, size, channels)
        mask = None if added is None else added.to(q.dtype)
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        done.append(out.view(rows, heads, count, size, channels))
    return done[0] if len(done) == 1 else torch.cat(done, dim=2)


def _chosen_bias(bias: Tensor, index: Tensor) -> Tensor:
    """[R or 1, U, C], [R, H, t, S] -> [R, H, t, S, C]"""
    if bias.shape[0] == 1:
        return bias[0][index]
    row = torch.arange(len(index), device=index.device).view(-1, 1, 1, 1)
    return bias[row, index]


def _join_others(
    keys: Tensor, values: Tensor, added: Tensor | None, others: Others
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values [R H, t, M, D] and their bias [R H, t, 1, M], followed by the others'."""
    groups, count, chosen = keys.shape[:3]
    spread = [x.flatten(0, 1).unsqueeze(1).expand(-1, count, -1, -1) for x in others[:2]]
    keys, values = torch.cat([keys, spread[0]], 2), torch.cat([values, spread[1]], 2)
    if added is None and others.bias is None:
        return keys, values, None
    rows, _, extra = others.keys.shape[:3]
    own = keys.new_zeros((groups, count, 1, chosen), dtype=torch.float32) if added is None else added
    more = keys.new_zeros((rows, extra), dtype=torch.float32) if others.bias is None else others.bias.float()
    more = more.repeat_interleave(groups // rows, 0).view(groups, 1, 1, extra).expand(-1, count, -1, -1)
    return keys, values, torch.cat([own, more], -1)
