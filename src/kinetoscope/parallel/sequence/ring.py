"""Attention whose keys and values go around a ring (arXiv 2310.01889)."""

from __future__ import annotations

from torch import Tensor

from kinetoscope.core.context import SharedAttention
from kinetoscope.parallel.groups import Group


def ring_attention(
    call: SharedAttention, q: Tensor, k: Tensor, v: Tensor, ring: Group, tokens: int, chunk: int
) -> Tensor:
    """To come."""
    raise NotImplementedError
