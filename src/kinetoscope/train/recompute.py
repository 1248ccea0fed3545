"""Activation checkpointing of a transformer's blocks, which read the forward context."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch.utils.checkpoint import checkpoint

from kinetoscope.core.context import current_context, forward_context


def recomputed(block: Callable[..., Any]) -> Callable[..., Any]:
    """Return `block` as a function whose intermediate results are computed again in the backward pass.

    The second computation happens in the backward pass, where the context of the forward is closed. So each call keeps
    the context that it finds, and the second computation opens it again.
    """

    def call(*x: Any, **arguments: Any) -> Any:
        context = current_context()
        assert context is not None
        kept = replace(context, stack=None)

        def compute(*x: Any, **arguments: Any) -> Any:
            with forward_context(replace(kept)):
                return block(*x, **arguments)

        return checkpoint(compute, *x, use_reentrant=False, preserve_rng_state=False, **arguments)

    return call
