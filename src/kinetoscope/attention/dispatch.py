"""The one function that attention layers call."""

from __future__ import annotations

from torch import Tensor

from kinetoscope.attention.table import BACKENDS, capabilities
from kinetoscope.core.context import current_context


def attention(q: Tensor, k: Tensor, v: Tensor, *, role: str, key_bias: Tensor | None = None) -> Tensor:
    """Softmax attention by the backend that the current `ForwardContext` gives to `role`.

    Outside a context, or for a role it does not list, the preferred backend of the device and dtype.

    Args:
        q: [R, N, H, D].
        k, v: [R, M, H, D].
        role: what the layer is, such as "self" or "cross".
        key_bias: [R, M] float32, added to the logits of each key; None adds nothing.

    Returns:
        [R, N, H, D] in the dtype of q.
    """
    context = current_context()
    backend = None if context is None else context.attention.get(role)
    if backend is None:
        backend = BACKENDS[capabilities(q.device.type, q.dtype).preferred]
    return backend(q, k, v, key_bias=key_bias)
