"""Ways to compute softmax attention. All take q [R, N, H, D], k and v [R, M, H, D], an optional additive `key_bias`
[R, M] float32 on the logits, and return [R, N, H, D] in the dtype of q. All are differentiable.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kinetoscope.core.context import Rows
from kinetoscope.core.onednn import onednn_linear, onednn_serves

CHUNK = 256  # query rows of a batched matmul
SCORES = 2**21  # scores of a chunk over its heads that stay in cache; four times as many are 2.4 times slower
HEADWISE_CHUNK = 512  # the same when one head is computed at a time
HEADWISE_SCORES = 256 * 256  # scores of a head from which float32 is faster one head at a time


def math_attention(q: Tensor, k: Tensor, v: Tensor, *, key_bias: Tensor | None = None) -> Tensor:
    """The formula in float32, all scores at once: slow, the oracle of the others."""
    logits = torch.einsum("rnhd,rmhd->rhnm", q.float(), k.float()) * q.shape[-1] ** -0.5
    if key_bias is not None:
        logits = logits + key_bias.float()[:, None, None]
    return torch.einsum("rhnm,rmhd->rnhd", logits.softmax(-1), v.float()).to(q.dtype)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, *, key_bias: Tensor | None = None) -> Tensor:
    """torch's `scaled_dot_product_attention`, which picks its own kernel for the device."""
    mask = None if key_bias is None else key_bias.to(q.dtype)[:, None, None]
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.transpose(1, 2)


SDPA_KINDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
"""Kernels of `scaled_dot_product_attention` by the name that follows "sdpa:"."""


def sdpa_by(kind: str) -> Callable[..., Tensor]:
    """`sdpa_attention` held to one of torch's kernels; where that has none for the shapes, torch says so."""
    kernel = SDPA_KINDS[kind]

    def attend(q: Tensor, k: Tensor, v: Tensor, *, key_bias: Tensor | None = None) -> Tensor:
        with sdpa_kernel(kernel):
            return sdpa_attention(q, k, v, key_bias=key_bias)

    return attend


def refuse_sdpa(kind: str, device: str, dtype: torch.dtype) -> str | None:
    """Why a kernel of torch's cannot serve on a device type in a dtype; None where it can."""
    if device == "cpu" and kind in ("efficient", "cudnn"):
        return "torch has this kernel on CUDA only"
    if device == "cuda" and kind in ("flash", "cudnn") and dtype not in (torch.float16, torch.bfloat16):
        return f"torch's kernel computes in float16 or bfloat16, not in {str(dtype).removeprefix('torch.')}"
    return None


def sdpa_without_bias(kind: str, device: str) -> str | None:
    """Why a kernel of torch's cannot add a key bias on a device type; None where it can."""
    return "torch's flash kernel takes no mask on CUDA" if kind == "flash" and device == "cuda" else None


def chunked_attention(q: Tensor, k: Tensor, v: Tensor, *, key_bias: Tensor | None = None) -> Tensor:
    """Matmul, softmax, matmul over chunks of query rows.

    In bfloat16 on a CPU the batched matmuls use dot-product instructions that torch's fused kernel does not. In float32
    inference each head is a plain product for oneDNN, twice as fast as the fused kernel's on some processors.
    """
    if torch.compiler.is_dynamo_compiling() and not torch.is_grad_enabled():
        return _opaque_chunked(q, k, v, key_bias)
    return _chunked(q, k, v, key_bias)


def _chunked(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None) -> Tensor:
    """See `chunked_attention`."""
    if q.dtype == torch.float32 and q.shape[1] * k.shape[1] >= HEADWISE_SCORES and onednn_serves(q, k):
        return _headwise(q, k, v, key_bias)
    r, n, h, d = q.shape
    queries = (q * d**-0.5).transpose(1, 2).reshape(r * h, n, d)
    # Contiguous now, or every product copies them again.
    keys = k.transpose(1, 2).contiguous().view(r * h, -1, d).transpose(1, 2)  # [R*H, D, M]
    values = v.transpose(1, 2).contiguous().view(r * h, -1, d)
    bias = None if key_bias is None else key_bias.to(q.dtype).repeat_interleave(h, dim=0).unsqueeze(1)  # [R*H, 1, M]
    heads = max(1, SCORES // (min(n, CHUNK) * keys.shape[2]))
    done: list[Tensor] = []
    for start in range(0, r * h, heads):
        group = slice(start, start + heads)
        chunks = [
            _softmax_product(part, keys[group], values[group], None if bias is None else bias[group])
            for part in queries[group].split(CHUNK, dim=1)
        ]
        done.append(chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=1))
    out = done[0] if len(done) == 1 else torch.cat(done)
    return out.view(r, h, n, d).transpose(1, 2)


def _dense_chunked(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None) -> Tensor:
    return _chunked(q, k, v, key_bias).contiguous()


# How many chunks there are depends on the lengths, so a graph that has them in it would be of one length of text.
_opaque_chunked = torch.library.custom_op("kinetoscope::chunked_attention", _dense_chunked, mutates_args=())


@_opaque_chunked.register_fake  # pyright: ignore[reportUnknownMemberType]
def _(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None) -> Tensor:
    return q.new_empty(q.shape)


def _softmax_product(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """[B, n, D], [B, D, M], [B, M, D], [B, 1, M] -> [B, n, D]"""
    logits = torch.bmm(q, keys) if bias is None else torch.baddbmm(bias, q, keys)
    return torch.bmm(logits.softmax(-1), values)


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


def masked_attention(q: Tensor, k: Tensor, v: Tensor, rows: Rows, *, key_bias: Tensor | None = None) -> Tensor:
    """All scores at once, those outside `rows` masked: for sequences so short that a product for each row costs more in
    calls and in gradients (each as large as the whole) than all that is masked does in arithmetic.

    Args:
        rows: which queries attend to which keys; every query to some.
    """
    mask = q.new_full((q.shape[1], k.shape[1]), -torch.inf)
    for own, seen in rows:
        for span in seen:
            mask[slice(*own), slice(*span)] = 0
    bias = mask if key_bias is None else mask + key_bias.to(q.dtype)[:, None, None]
    logits = (q * q.shape[-1] ** -0.5).transpose(1, 2) @ k.permute(0, 2, 3, 1) + bias  # [R, H, N, M]
    return (logits.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)
