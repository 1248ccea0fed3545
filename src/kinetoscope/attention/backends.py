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
