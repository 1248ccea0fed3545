"""torch's FlexAttention: a key bias as a score modification, and selected tiles as a block mask.

It is compiled on first use, once a shape. Inside a region that is being compiled it is called plainly.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention


def refuse_flex(device: str, dtype: torch.dtype) -> str | None:
    """Why it cannot serve on a device type in a dtype; None where it can."""
    if device != "cuda":
        return "on the CPU it has no gradient, and over a few biased keys it was wrong when compiled (torch 2.13)"
    return None


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def _call(*args: Tensor, **options: object) -> Tensor:
    if (
        torch.compiler.is_dynamo_compiling() or args[0].device.type == "cpu"
    ):  # on the CPU plainly: for tests of the masks
        return flex_attention(*args, **options)  # pyright: ignore[reportReturnType, reportArgumentType, reportCallIssue]
    return _compiled()(*args, **options)


def flex_dense_attention(q: Tensor, k: Tensor, v: Tensor, *, key_bias: Tensor | None = None) -> Tensor:
    """Dense attention; see `backends.math_attention`."""
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    if key_bias is None:
        return _call(*heads).transpose(1, 2)
    bias = key_bias.float()

    def add_bias(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias[row, key]

    return _call(*heads, score_mod=add_bias).transpose(1, 2)


def flex_takes(*sizes: int) -> bool:
    """Whether the kernels can work on tiles of these numbers of tokens."""
    return all(size % 16 == 0 for size in sizes)


def flex_tile_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, selected: Tensor) -> Tensor:
    """Exact attention of query tiles to the key tiles selected for them.

    Args:
        q: [R, H, T, B, D].
        k, v: [R, H, U, C, D].
        bias: [R or 1, U, C] float32 on the logits of keys (-inf for slots that hold no token), or None.
        selected: [R or 1, H or 1, T, U] bool.

    Returns:
        [R, H, T, B, D].
    """
    rows, heads, tiles, size = q.shape[:4]
    key_tiles, key_size = k.shape[2:4]
    row_stride, head_stride = int(selected.shape[0] > 1), int(selected.shape[1] > 1)
    flat_bias = None if bias is None else bias.flatten(1)
    bias_stride = int(bias is not None and bias.shape[0] > 1)

    def is_selected(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return selected[row * row_stride, head * head_stride, query // size, key // key_size]

    def add_bias(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert flat_bias is not None
        return score + flat_bias[row * bias_stride, key]

    counts = selected.sum(-1, dtype=torch.int32)  # [R, H, T]
    order = selected.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    # No tile is called full: a full one would skip `is_selected`, which costs little, but then a block would have to
    # be listed in one of two places, and empty lists are what kernels of some releases stumble over.
    mask = BlockMask.from_kv_blocks(
        counts, order, BLOCK_SIZE=(size, key_size), mask_mod=is_selected,
        seq_lengths=(tiles * size, key_tiles * key_size),
    )  # fmt: skip
    options: dict[str, object] = {} if bias is None else {"score_mod": add_bias}
    # A kernel's block must divide a tile: the largest power of two that does, up to 64.
    options["kernel_options"] = {"BLOCK_M": min(64, size & -size), "BLOCK_N": min(64, key_size & -key_size)}
    out = _call(q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3), block_mask=mask, **options)
    return out.view(rows, heads, tiles, size, -1)
