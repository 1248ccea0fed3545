"""The one function that attention layers call."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kinetoscope.attention.default import default_attention
from kinetoscope.attention.sparse.base import SparseAttention, Trained
from kinetoscope.core.context import AttentionFn, current_context


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    role: str,
    key_bias: Tensor | None = None,
    grid: tuple[int, int, int] | None = None,
    gate: Callable[[], Tensor] | None = None,
    project: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Softmax attention by the backend that the current `ForwardContext` gives to `role`.

    Outside a context, or for a role it does not list, the preferred backend of the device and dtype.

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

    Returns:
        [R, N, H, D] in the dtype of q.
    """
    context = current_context()
    named = None if context is None else context.attention.get(role)
    backend: AttentionFn = default_attention if named is None else named
    if grid is None or not isinstance(backend, SparseAttention):
        return backend(q, k, v, key_bias=key_bias)
    trained = Trained(gate() if gate is not None and backend.gated else None, project)
    return backend.over_grid(q, k, v, key_bias=key_bias, grid=grid, trained=trained)
