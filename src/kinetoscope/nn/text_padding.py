"""Attention to zero padding that a model learned, without computing it token by token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kinetoscope.core.errors import InputError

TEXT_MULTIPLE = 32
"""Text tokens are kept in this multiple; softmax over fewer is 8 times slower on a CPU."""


def fold_padding(text: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
    """Text whose equal padding tokens are folded into the last one kept.

    Tokens beyond the true length are equal, so are their keys and values: attention to n of them is attention to one
    with log n added to its logit.

    Args:
        text: [R, L, D], zero beyond each row's length.
        lengths: [R] true lengths.

    Returns:
        text [R, L', D] with L' <= L, and the bias of its keys [R, L'] float32; None where nothing was folded.

    Raises:
        InputError: a length is not in [0, L].
    """
    total, longest = text.shape[1], int(lengths.max())
    if int(lengths.min()) < 0 or longest > total:
        raise InputError(f"text_lengths must be in [0, {total}], the text given; got {lengths.tolist()}")
    kept = -(-(longest + 1) // TEXT_MULTIPLE) * TEXT_MULTIPLE
    if kept >= total:
        return text, None
    bias = torch.zeros(len(text), kept, dtype=torch.float32, device=text.device)
    bias[:, -1] = math.log(1 + total - kept)
    return text[:, :kept], bias
