"""The one function that attention layers call."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from kinetoscope.attention.backends import masked_attention
from kinetoscope.attention.default import default_attention
from kinetoscope.attention.sparse.base import SparseAttention, Trained
from kinetoscope.core.context import AttentionFn, Rows, SharedAttention, Span, current_context

MIXING = ("self", "joint")
"""Roles whose queries and keys are the tokens of the video: where those are shared out among processes, the attention
is done by all of them together. In other roles queries attend to what every process has."""

SHORT = 2**15
"""Scores of a head up to which a mask, and no product for each row of `rows`, says who attends to whom. With gradients,
on one core: 144 tokens of 18 rows take 0.6 of the time, 288 tokens 1.1, 504 tokens 1.9."""

Grid = tuple[int, int, int]
Memory = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    role: str,
    key_bias: Tensor | None = None,
    grid: Grid | None = None,
    gate: Callable[[], Tensor] | None = None,
    project: Callable[[Tensor], Tensor] | None = None,
    rows: Rows | None = None,
    lead: int = 0,
    memory: Memory | None = None,
) -> Tensor:
    """Softmax attention by the backend that the current `ForwardContext` gives to `role`.

    Outside a context, or for a role it does not list, the preferred backend of the device and dtype.

    Where the tokens are shared out (sequence parallel), q, k, v and the gate are of this process's tokens, and
    `key_bias`, `grid` and `rows` are of the whole sequence, as they are without sharing. Tokens at the end of q, k and
    v beyond this process's are ones that every process has (text).

    Args:
        q: [R, N, H, D].
        k, v: [R, M, H, D].
        role: what the layer is, such as "self" or "cross".
        key_bias: [R, M] float32, added to the logits of each key; None adds nothing.
        grid: (T, H, W) where the leading T H W queries and keys are the tokens of a whole video in that order; what
            comes after them (text) is attended to, and attends, densely. None: all of it is dense, also under a sparse
            kind.
        gate: makes the gates [R, T H W, H, D] of video sparse attention (arXiv 2505.13389), for models that have
            them; called only where they are used.
        project: the trained projection of sparse-linear attention (arXiv 2509.24006), [..., D] -> [..., D].
        rows: which queries attend to which keys; None: all to all.
        lead: keys before those of the queries' own tokens (of condition frames, kept from an earlier pass).
        memory: takes keys and values of the queries' tokens, and returns all those that are attended to (a K/V cache,
            which remembers them). Where heads are shared out it is given its process's heads of all tokens.

    Returns:
        [R, N, H, D] in the dtype of q.
    """
    context = current_context()
    named = None if context is None else context.attention.get(role)
    backend: AttentionFn = default_attention if named is None else named
    made = gate() if gate is not None and grid is not None and _gated(backend) else None
    if context is not None and context.share is not None and role in MIXING:
        return _attend_shared(q, k, v, key_bias, grid, made, project, rows, lead, memory, backend)
    if memory is not None:
        k, v = memory(k, v)
    return _attend(q, k, v, key_bias, grid, made, project, rows, backend)


def _gated(backend: AttentionFn) -> bool:
    return isinstance(backend, SparseAttention) and backend.gated


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    grid: Grid | None,
    gate: Tensor | None,
    project: Callable[[Tensor], Tensor] | None,
    rows: Rows | None,
    backend: AttentionFn,
) -> Tensor:
    """Attention of tensors that are all here."""
    if rows is not None and backend is default_attention and q.shape[1] * k.shape[1] <= SHORT:
        return masked_attention(q, k, v, rows, key_bias=key_bias)
    if rows is not None:
        parts = [
            backend(q[:, slice(*own)], spans_of(k, seen, 1), spans_of(v, seen, 1),
                    key_bias=None if key_bias is None else spans_of(key_bias, seen, 1))
            for own, seen in rows
        ]  # fmt: skip
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    if grid is None or not isinstance(backend, SparseAttention):
        return backend(q, k, v, key_bias=key_bias)
    return backend.over_grid(q, k, v, key_bias=key_bias, grid=grid, trained=Trained(gate, project))


def _shared(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    grid: Grid | None,
    gate: Tensor | None,
    project: Callable[[Tensor], Tensor] | None,
    rows: Rows | None,
    lead: int,
    memory: Memory | None,
    backend: AttentionFn,
) -> Tensor:
    """Attention over the tokens of all processes. A compiled region breaks here, since processes talk."""
    context = current_context()
    assert context is not None and context.share is not None

    def local(
        q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, rows: Rows | None, gate: Tensor | None
    ) -> Tensor:
        return _attend(q, k, v, key_bias, grid, gate, project, rows, backend)

    sparse = str(backend) if grid is not None and isinstance(backend, SparseAttention) else ""
    call = SharedAttention(q, k, v, lead, key_bias, rows, gate, memory, sparse, local)
    return context.share.attend(call)


_attend_shared = cast(Callable[..., Tensor], torch.compiler.disable(_shared))


def spans_of(x: Tensor, spans: tuple[Span, ...], axis: int) -> Tensor:
    """The entries of `spans`, one after another."""
    parts = [x.narrow(axis, start, stop - start) for start, stop in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)
