"""Sequence parallel, as a hook: the blocks of each forward run on this process's part of the tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from kinetoscope.core.context import ForwardContext, TokenShard, current_context, forward_context
from kinetoscope.engine.hooks.base import Forward, Interceptor
from kinetoscope.engine.protocols import ModelInputs, StrategyState


class SequenceParallel(Interceptor):
    """Shares out the tokens that blocks run on among the processes of `shard`.

    The innermost of the interceptors: what stands around the forward, step caches too, sees whole tokens in every
    process. Every process makes the same forwards in the same order.

    Args:
        shard: who shares them; `parallel.sequence.SequenceShard.of(groups)`.
    """

    name: ClassVar[str] = "sequence-parallel"
    order: ClassVar[int] = 900
    from_options: ClassVar[bool] = True

    def __init__(self, shard: TokenShard) -> None:
        self.shard = shard

    def around_forward(self, call: Forward, state: StrategyState, inputs: ModelInputs) -> Tensor:
        """The forward, whose blocks find the shard in their context."""
        with forward_context(replace(current_context() or ForwardContext(), shard=self.shard)):
            return call(state, inputs)
