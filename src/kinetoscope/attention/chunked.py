"""Softmax attention as matmul, softmax, matmul over chunks of query rows and of heads: the "chunked" backend.

In bfloat16 on a CPU with AVX512 the batched matmuls use dot-product instructions that torch's fused kernel does not. In
float32 inference each head is a plain product for oneDNN, twice as fast as the fused kernel's on some processors.

The number of chunks depends on the lengths, so a graph that contained the loop would serve one length of text only. A
compiled region therefore calls the loop as one operator: `_opaque_chunked` without gradients, and with gradients
`_opaque_products`, whose backward is an operator as well. The latter works on tensors whose first axis is the head, so
that the region fuses their copies with what stands before and after attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kinetoscope.core.onednn import onednn_linear, onednn_serves

CHUNK = 256  # query rows of a batched matmul
SCORES = 2**21  # scores of a chunk over its heads that stay in cache; four times as many are 2.4 times slower
HEADWISE_CHUNK = 512  # the same when one head is computed at a time
HEADWISE_SCORES = 256 * 256  # scores of a head from which float32 is faster one head at a time


def chunked_attention(q: Tensor, k: Tensor, v: Tensor, *, key_bias: Tensor | None = None) -> Tensor:
    """Return softmax attention, computed in chunks; without queries or without keys it is empty or zero.

    Args:
        q: [R, N, H, D].
        k, v: [R, M, H, D].
        key_bias: [R, M] added to the logits of each key; None adds nothing.

    Returns:
        [R, N, H, D] in the dtype of q; in autocast's dtype where autocast is on.
    """
    if torch.is_autocast_enabled("cpu"):  # as of SDPA; the operators of a compiled region run without autocast
        q, k, v = (x.to(torch.get_autocast_dtype("cpu")) for x in (q, k, v))
        with torch.autocast("cpu", enabled=False):
            return _dispatch(q, k, v, key_bias)
    return _dispatch(q, k, v, key_bias)


def _dispatch(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None) -> Tensor:
    if not torch.compiler.is_dynamo_compiling():
        return _chunked(q, k, v, key_bias)
    inputs = (q, k, v) if key_bias is None else (q, k, v, key_bias)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        bias = _bias_by_head(key_bias, q)
        out = _opaque_products(_by_head(q * q.shape[-1] ** -0.5), _by_head(k), _by_head(v), bias)[0]
        return out.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)
    return _opaque_chunked(q, k, v, key_bias)


def _chunked(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None) -> Tensor:
    """See `chunked_attention`."""
    if q.dtype == torch.float32 and q.shape[1] * k.shape[1] >= HEADWISE_SCORES and onednn_serves(q, k):
        return _headwise(q, k, v, key_bias)
    r, n, h, d = q.shape
    queries, keys, values = _by_head(q * d**-0.5), _by_head(k).mT, _by_head(v)
    bias = _bias_by_head(key_bias, q)
    heads = _heads_of_a_chunk(n, k.shape[1])
    done: list[Tensor] = []
    for start in range(0, max(1, r * h), heads):  # once without rows too, for the graph of gradients
        group = slice(start, start + heads)
        chunks = [
            torch.bmm(_logits(part, keys[group], None if bias is None else bias[group]).softmax(-1), values[group])
            for part in queries[group].split(CHUNK, dim=1)
        ]
        done.append(chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=1))
    out = done[0] if len(done) == 1 else torch.cat(done)
    return out.view(r, h, n, d).transpose(1, 2)


def _by_head(x: Tensor) -> Tensor:
    """[R, N, H, D] -> [R*H, N, D], contiguous: or every product would copy it again."""
    return x.transpose(1, 2).contiguous().flatten(0, 1)


def _bias_by_head(key_bias: Tensor | None, q: Tensor) -> Tensor | None:
    """[R, M] -> [R*H, 1, M] in the dtype of q."""
    return None if key_bias is None else key_bias.to(q.dtype).repeat_interleave(q.shape[2], dim=0).unsqueeze(1)


def _heads_of_a_chunk(queries: int, keys: int) -> int:
    """Return how many heads of a chunk have scores that stay in cache together."""
    return max(1, SCORES // max(1, min(queries, CHUNK) * keys))


def _logits(q: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
    """[B, n, D], [B, D, M], [B, 1, M] -> [B, n, M]"""
    return torch.bmm(q, keys) if bias is None else torch.baddbmm(bias, q, keys)


def _headwise(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None) -> Tensor:
    """One head at a time: logits are a linear layer with the keys as weight (and the key bias as bias)."""
    r, n, h, d = q.shape
    queries = (q * d**-0.5).transpose(1, 2).contiguous()  # [R, H, N, D]
    keys = k.transpose(1, 2).contiguous()  # [R, H, M, D]
    values = v.permute(0, 2, 3, 1).contiguous()  # [R, H, D, M]
    out = torch.empty_like(q)
    for row in range(r):
        bias = None if key_bias is None else key_bias[row]
        for head in range(h):
            for start in range(0, n, HEADWISE_CHUNK):
                part = slice(start, start + HEADWISE_CHUNK)
                weights = onednn_linear(queries[row, head, part], keys[row, head], bias).softmax(-1)
                out[row, part, head] = onednn_linear(weights, values[row, head], None)
    return out


# -- in compiled regions ---------------------------------------------------------------------------------------------


def _dense_chunked(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None) -> Tensor:
    return _chunked(q, k, v, key_bias).contiguous()


_opaque_chunked = torch.library.custom_op("kinetoscope::chunked_attention", _dense_chunked, mutates_args=())


@_opaque_chunked.register_fake  # pyright: ignore[reportUnknownMemberType]
def _(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None) -> Tensor:
    return q.new_empty(q.shape)


def _chunks(queries: Tensor, keys: Tensor, weights: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield (heads, query rows, their part of `weights`) of each chunk of [B, N, D] and [B, M, D]."""
    total, n, m = len(queries), queries.shape[1], keys.shape[1]
    heads, used = _heads_of_a_chunk(n, m), 0
    for first in range(0, total, heads):
        for start in range(0, n, CHUNK):
            shape = min(heads, total - first), min(CHUNK, n - start), m
            size = shape[0] * shape[1] * m
            yield slice(first, first + heads), slice(start, start + CHUNK), weights[used : used + size].view(shape)
            used += size


def _products(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return attention of all heads, and its weights, which the gradients need.

    Args:
        queries: [B, N, D], scaled.
        keys, values: [B, M, D].
        bias: [B, 1, M].

    Returns:
        [B, N, D], and the weights of each chunk one after another, B N M in all.
    """
    out, weights = torch.empty_like(queries), queries.new_empty(queries.shape[0] * queries.shape[1] * keys.shape[1])
    for heads, part, own in _chunks(queries, keys, weights):
        logits = _logits(queries[heads, part], keys[heads].mT, None if bias is None else bias[heads])
        torch.softmax(logits, -1, out=own)
        out[heads, part] = torch.bmm(own, values[heads])
    return out, weights


_opaque_products = torch.library.custom_op("kinetoscope::chunked_products", _products, mutates_args=())


@_opaque_products.register_fake  # pyright: ignore[reportUnknownMemberType]
def _(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(queries), queries.new_empty(queries.shape[0] * queries.shape[1] * keys.shape[1])


def _gradients(
    grad: Tensor, queries: Tensor, keys: Tensor, values: Tensor, weights: Tensor, bias_too: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys, values and, if asked, of the bias [B, 1, M] (else an empty tensor).

    Args:
        grad: [B, N, D] of the attention.
        queries, keys, values: arguments of `_products`.
        weights: what it returned as its second result.
        bias_too: whether the bias needs its gradient.
    """
    dq, dk, dv = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    dbias = keys.new_zeros(len(keys), 1, keys.shape[1] if bias_too else 0)
    once = queries.shape[1] <= CHUNK  # one chunk of queries, so nothing is added up
    for heads, part, own in _chunks(queries, keys, weights):
        g = grad[heads, part]
        dlogits = torch.ops.aten._softmax_backward_data(torch.bmm(g, values[heads].mT), own, -1, own.dtype)
        dq[heads, part] = torch.bmm(dlogits, keys[heads])
        if once:
            torch.bmm(dlogits.mT, queries[heads, part], out=dk[heads])
            torch.bmm(own.mT, g, out=dv[heads])
        else:
            dk[heads].baddbmm_(dlogits.mT, queries[heads, part])
            dv[heads].baddbmm_(own.mT, g)
        if bias_too:
            dbias[heads] += dlogits.sum(1, keepdim=True)
    return dq, dk, dv, dbias


_opaque_gradients = torch.library.custom_op("kinetoscope::chunked_gradients", _gradients, mutates_args=())


@_opaque_gradients.register_fake  # pyright: ignore[reportUnknownMemberType]
def _(
    grad: Tensor, queries: Tensor, keys: Tensor, values: Tensor, weights: Tensor, bias_too: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = keys.new_empty(len(keys), 1, keys.shape[1] if bias_too else 0)
    return torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(values), dbias


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, bias = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.bias_too = bias is not None and bias.requires_grad


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    dq, dk, dv, dbias = _opaque_gradients(grad.contiguous(), *ctx.saved_tensors, ctx.bias_too)
    return dq, dk, dv, dbias if ctx.bias_too else None


_opaque_products.register_autograd(_backward, setup_context=_keep)  # pyright: ignore[reportUnknownMemberType]
