"""A Triton kernel of `blocks.attend_tiles`, forward only. Experimental: so far it ran in Triton's interpreter only.

Imported when it is called; nothing else needs Triton.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from kinetoscope.attention.sparse.blocks import Others

QUERY_ROWS = 64  # queries a program
KEY_COLUMNS = 64  # keys a product


@triton.jit
def _see(q, k_base, v_base, bias_base, columns, channels, scale, top, total, out,
         COLUMNS: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """One run of `columns` keys into a running softmax: maxima `top`, sums `total`, values `out`."""
    c = tl.arange(0, CHANNELS)
    for begin in range(0, columns, COLUMNS):
        j = begin + tl.arange(0, COLUMNS)
        held = (j < columns)[:, None] & (c < channels)[None, :]
        k = tl.load(k_base + j[:, None] * channels + c[None, :], mask=held, other=0.0)
        v = tl.load(v_base + j[:, None] * channels + c[None, :], mask=held, other=0.0)
        bias = tl.load(bias_base + j, mask=j < columns, other=float("-inf"))
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias[None, :]
        highest = tl.maximum(top, tl.max(logits, 1))
        weights = tl.exp(logits - highest[:, None])
        kept = tl.exp(top - highest)
        total = total * kept + tl.sum(weights, 1)
        out = out * kept[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = highest
    return top, total, out


@triton.jit
def _attend(q_ptr, k_ptr, v_ptr, bias_ptr, index_ptr, more_k_ptr, more_v_ptr, more_bias_ptr, out_ptr,
            heads, tiles, size, key_tiles, key_size, chosen, more, channels, scale,
            bias_rows, index_rows, index_heads, more_bias_rows,
            ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """`ROWS` queries of one tile of one head over the tiles in its list, then over the `more` keys all see."""
    runs = tl.cdiv(size, ROWS)
    tile, run = tl.program_id(0) // runs, tl.program_id(0) % runs
    group = tl.program_id(1).to(tl.int64)  # row, head
    row, head = group // heads, group % heads
    i, c = run * ROWS + tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    held = (i < size)[:, None] & (c < channels)[None, :]
    place = (group * tiles + tile) * size * channels + i[:, None] * channels + c[None, :]
    q = tl.load(q_ptr + place, mask=held, other=0.0)
    top = tl.full([ROWS], -1.0e30, tl.float32)  # not -inf: the difference of two would be no number
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, CHANNELS], tl.float32)
    numbers = index_ptr + (((row % index_rows) * index_heads + head % index_heads) * tiles + tile) * chosen
    for s in range(chosen):
        number = tl.load(numbers + s).to(tl.int64)
        keys = (group * key_tiles + number) * key_size
        bias = bias_ptr + ((row % bias_rows) * key_tiles + number) * key_size
        top, total, out = _see(q, k_ptr + keys * channels, v_ptr + keys * channels, bias, key_size, channels, scale,
                               top, total, out, COLUMNS, CHANNELS)  # fmt: skip
    keys = group * more * channels
    top, total, out = _see(q, more_k_ptr + keys, more_v_ptr + keys, more_bias_ptr + (row % more_bias_rows) * more, more,
                           channels, scale, top, total, out, COLUMNS, CHANNELS)  # fmt: skip
    tl.store(out_ptr + place, (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=held)


def attend_tiles_triton(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, index: Tensor, others: Others | None = None
) -> Tensor:
    """As `blocks.attend_tiles`, without a gradient."""
    rows, heads, tiles, size, channels = q.shape
    key_tiles, key_size = k.shape[2:4]
    nothing = k.new_zeros(rows, heads, 0, channels)
    more_k, more_v = (nothing, nothing) if others is None else (others.keys, others.values)
    more = more_k.shape[2]
    bias = q.new_zeros((1, key_tiles, key_size), dtype=torch.float32) if bias is None else bias
    more_bias = None if others is None else others.bias
    more_bias = q.new_zeros((1, more), dtype=torch.float32) if more_bias is None else more_bias.float()
    q, k, v, more_k, more_v = (x.contiguous() for x in (q, k, v, more_k, more_v))
    index = index.to(torch.int32).contiguous()
    out = torch.empty_like(q)
    query_rows = min(QUERY_ROWS, max(16, triton.next_power_of_2(size)))
    launch: Any = _attend
    launch[(tiles * triton.cdiv(size, query_rows), rows * heads)](
        q, k, v, bias.contiguous(), index, more_k, more_v, more_bias.contiguous(), out,
        heads, tiles, size, key_tiles, key_size, index.shape[-1], more, channels, channels**-0.5,
        len(bias), index.shape[0], index.shape[1], len(more_bias),
        ROWS=query_rows, COLUMNS=min(KEY_COLUMNS, max(16, triton.next_power_of_2(key_size))),
        CHANNELS=max(16, triton.next_power_of_2(channels)),
    )  # fmt: skip
    return out
