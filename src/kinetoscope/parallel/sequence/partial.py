"""Softmax attention over some of the keys, and how such parts make the whole.

Of each part one keeps, besides its output, the logarithm of the sum of its exponentials; two parts then make the
attention over the keys of both without ever having been in one place (arXiv 2112.05682).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 512
"""Queries at once, where no fused kernel gives the sums."""
HALF = (torch.float16, torch.bfloat16)


class Partial(NamedTuple):
    """Attention over some keys.

    Attributes:
        out: [R, N, H, D], float32 once merged.
        lse: [R, N, H, 1] float32, minus infinity where no key is seen.
    """

    out: Tensor
    lse: Tensor


def partial_attention(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None = None) -> Partial:
    """Attention of q [R, N, H, D] over k, v [R, M, H, D] with `key_bias` [R, M], by the device's fused kernel if it
    tells the sums."""
    if key_bias is not None or not k.shape[1]:
        return formula(q, k, v, key_bias)
    turned = [t.transpose(1, 2) for t in (q, k, v)]
    aten, scale = torch.ops.aten, q.shape[-1] ** -0.5
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*turned, 0.0, False, scale=scale)
    elif q.device.type == "cuda" and q.dtype in HALF and q.shape[-1] % 8 == 0:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(*turned, 0.0, False, False, scale=scale)
    elif q.device.type == "cuda" and q.shape[-1] % 4 == 0:
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(*turned, None, True, scale=scale)
        lse = lse[..., : q.shape[1]]  # it comes in a multiple of 32
    else:
        return formula(q, k, v, None)
    return Partial(out.transpose(1, 2), lse.float().transpose(1, 2).unsqueeze(-1))


def formula(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None) -> Partial:
    """As written, in float32, some rows of queries at a time; keys may all be hidden, or there may be none."""
    keys, values = k.float().permute(0, 2, 3, 1), v.float().transpose(1, 2)  # [R, H, D, M], [R, H, M, D]
    outs: list[Tensor] = []
    sums: list[Tensor] = []
    for part in (q.float() * q.shape[-1] ** -0.5).transpose(1, 2).split(ROWS, dim=2):
        logits = part @ keys  # [R, H, n, M]
        if key_bias is not None:
            logits = logits + key_bias.float()[:, None, None]
        lse = torch.logsumexp(logits, dim=-1, keepdim=True)
        outs.append((logits - lse.clamp(min=torch.finfo(torch.float32).min)).exp() @ values)
        sums.append(lse)
    return Partial(torch.cat(outs, dim=2).transpose(1, 2), torch.cat(sums, dim=2).transpose(1, 2))


def merge(a: Partial | None, b: Partial) -> Partial:
    """Attention over the keys of both, in float32."""
    if a is None:
        return Partial(b.out.float(), b.lse)
    lse = torch.logaddexp(a.lse, b.lse)
    finite = lse.clamp(min=torch.finfo(torch.float32).min)  # both without a key: weights of zero
    return Partial(a.out * (a.lse - finite).exp() + b.out.float() * (b.lse - finite).exp(), lse)


def partial_gradient(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, whole: Partial, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in float32, where k and v are some of the keys that `whole` is the attention over.

    The probabilities are made again from the sums of the whole (arXiv 2205.14135).

    Args:
        q, k, v, key_bias: see `partial_attention`.
        whole: over all keys.
        grad: [R, N, H, D] of its output.
    """
    scale = q.shape[-1] ** -0.5
    keys, values = (t.float().transpose(1, 2) for t in (k, v))  # [R, H, M, D]
    finite = whole.lse.clamp(min=torch.finfo(torch.float32).min)
    spread = (grad * whole.out).sum(-1, keepdim=True)  # [R, N, H, 1]
    split = [t.float().transpose(1, 2).split(ROWS, dim=2) for t in (q, finite, spread, grad)]
    dq: list[Tensor] = []
    dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
    for q_part, lse, inner, g in zip(*split, strict=True):
        logits = q_part * scale @ keys.mT  # [R, H, n, M]
        if key_bias is not None:
            logits = logits + key_bias.float()[:, None, None]
        seen = (logits - lse).exp()
        dlogits = seen * (g @ values.mT - inner) * scale
        dq.append(dlogits @ keys)
        dk += dlogits.mT @ q_part
        dv += seen.mT @ g
    return torch.cat(dq, dim=2).transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
