"""Ways to compute softmax attention. All take q [R, N, H, D], k and v [R, M, H, D], an optional additive `key_bias`
[R, M] float32 on the logits, and return [R, N, H, D] in the dtype of q. All are differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 256  # query rows whose scores stay in cache


def math_attention(q: Tensor, k: Tensor, v: Tensor, *, key_bias: Tensor | None = None) -> Tensor:
    """The formula in float32, all scores at once: slow, the oracle of the others."""
    logits = torch.einsum("rnhd,rmhd->rhnm", q.float(), k.float()) * q.shape[-1] ** -0.5
    if key_bias is not None:
        logits = logits + key_bias.float()[:, None, None]
    return torch.einsum("rhnm,rmhd->rnhd", logits.softmax(-1), v.float()).to(q.dtype)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, *, key_bias: Tensor | None = None) -> Tensor:
    """torch's `scaled_dot_product_attention`, which picks its own kernel for the device."""
    mask = None if key_bias is None else key_bias.to(q.dtype)[:, None, None]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
    )
    return out.transpose(1, 2)


def chunked_attention(q: Tensor, k: Tensor, v: Tensor, *, key_bias: Tensor | None = None) -> Tensor:
    """Batched matmul, softmax, batched matmul over chunks of query rows.

    On a CPU in bfloat16 the matmuls use the dot-product instructions that torch's own kernel does not.
    """
    r, n, h, d = q.shape
    m = k.shape[1]
    queries = (q * d**-0.5).transpose(1, 2).reshape(r * h, n, d)
    keys = k.permute(0, 2, 3, 1).reshape(r * h, d, m)
    values = v.transpose(1, 2).reshape(r * h, m, d)
    bias = (
        None if key_bias is None else key_bias.to(q.dtype).repeat_interleave(h, dim=0).unsqueeze(1)
    )  # [R*H, 1, M]
    chunks: list[Tensor] = []
    for part in queries.split(CHUNK, dim=1):
        logits = torch.bmm(part, keys) if bias is None else torch.baddbmm(bias, part, keys)
        chunks.append(torch.bmm(logits.softmax(-1), values))
    out = chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=1)
    return out.view(r, h, n, d).transpose(1, 2)
