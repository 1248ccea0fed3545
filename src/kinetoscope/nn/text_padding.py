"""What cross-attention makes of text beyond its true length: the padding that a model learned, or nothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kinetoscope.core.errors import InputError

TEXT_MULTIPLE = 32
"""Text tokens are kept in this multiple; softmax over fewer is 8 times slower on a CPU."""


PADDED, TRUE_LENGTH = "padded", "true_length"


def read_text(text: Tensor, lengths: Tensor, mode: str = PADDED) -> tuple[Tensor, Tensor | None]:
    """Text of few tokens, and the bias of its keys, that stand for the whole under a text mode.

    Args:
        text: [R, L, D], zero beyond each row's length.
        lengths: [R] true lengths.
        mode: "padded": the zeros are attended to, as models do that were trained so; "true_length": they are not.

    Raises:
        InputError: a length is not in [0, L] ([1, L] for "true_length").
    """
    return mask_padding(text, lengths) if mode == TRUE_LENGTH else fold_padding(text, lengths)


def read_before_text(features: Tensor, text: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return text with embedded image features in front of it, for models whose layers read both alike.

    Args:
        features: [R, I, d].
        text: [R, L, d].
        bias: [R, L] of the text's keys, or None.

    Returns:
        tokens [R, I + L, d], and the bias of their keys [R, I + L] or None.
    """
    joined = torch.cat([features, text], dim=1)
    return joined, None if bias is None else torch.nn.functional.pad(bias, (features.shape[1], 0))


def mask_padding(text: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Text cut to the longest of `lengths`, in multiples, and the bias that hides what is beyond a row's own.

    Args:
        text: [R, L, D].
        lengths: [R] true lengths.

    Returns:
        text [R, L', D] with L' <= L, and the bias of its keys [R, L'] float32.

    Raises:
        InputError: a length is not in [1, L].
    """
    total, longest = text.shape[1], int(lengths.max())
    if int(lengths.min()) < 1 or longest > total:
        raise InputError(f"text_lengths must be in [1, {total}], the text given; got {lengths.tolist()}")
    kept = min(-(-longest // TEXT_MULTIPLE) * TEXT_MULTIPLE, total)
    beyond = torch.arange(kept, device=text.device) >= lengths.to(text.device).unsqueeze(1)
    return text[:, :kept], torch.zeros(beyond.shape, device=text.device).masked_fill(beyond, -math.inf)


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
