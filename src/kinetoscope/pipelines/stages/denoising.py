"""The stage that runs the engine."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from kinetoscope.core.errors import KinetoscopeError
from kinetoscope.core.protocols import check_factory
from kinetoscope.core.types import ExecutionArgs, ForwardBatch
from kinetoscope.diffusion.scheduler import SchedulerAdapter
from kinetoscope.engine.batching import BatchedRun, StepBatcher
from kinetoscope.engine.engine import DenoisingEngine
from kinetoscope.engine.hooks.base import Hook, Interceptor
from kinetoscope.engine.protocols import DenoisingStrategy, Event, wanted_protocol
from kinetoscope.engine.strategies.standard import StandardStrategy
from kinetoscope.pipelines.lazy import Lazy, resolve
from kinetoscope.pipelines.stages.base import Stage


class DenoisingStage(Stage):
    """Denoises the latents with one strategy.

    Args:
        transformer: the network, or lazy.
        scheduler: the prototype, or lazy.
        strategy_cls: makes the strategy from this stage.
        hooks: hooks of every run; a batch may bring more.
        transformer_2: the network of low noise levels, or lazy, for models with two.
        boundary: the timestep below which it takes over.
    """

    def __init__(
        self,
        transformer: Any | Lazy[Any],
        scheduler: SchedulerAdapter | Lazy[SchedulerAdapter],
        strategy_cls: Callable[[DenoisingStage], DenoisingStrategy] = StandardStrategy,
        hooks: Sequence[Hook] = (),
        transformer_2: Any | Lazy[Any] = None,
        boundary: float = 0.0,
    ) -> None:
        self._transformer = transformer
        self._scheduler = scheduler
        self.strategy_cls = strategy_cls
        self.hooks: tuple[Hook, ...] = tuple(hooks)
        self._transformer_2 = transformer_2
        self.boundary = boundary

    @property
    def strategy_cls(self) -> Callable[[DenoisingStage], DenoisingStrategy]:
        """What makes the strategy of a run from this stage; to set a class refuses one that lacks a method."""
        return self._strategy_cls

    @strategy_cls.setter
    def strategy_cls(self, strategy_cls: Callable[[DenoisingStage], DenoisingStrategy]) -> None:
        check_factory(strategy_cls, wanted_protocol, "strategy_cls")
        self._strategy_cls = strategy_cls

    @property
    def transformer(self) -> Any:
        """The network, loaded on first use."""
        return resolve(self._transformer)

    @property
    def transformer_2(self) -> Any:
        """The network of low noise levels, loaded on first use."""
        return resolve(self._transformer_2)

    @property
    def scheduler(self) -> SchedulerAdapter:
        """The scheduler prototype."""
        return resolve(self._scheduler)

    def engine(self, batch: ForwardBatch) -> DenoisingEngine:
        """An engine with this stage's hooks and the batch's."""
        return DenoisingEngine(self.strategy_cls(self), [*self.hooks, *batch.hooks])

    @torch.no_grad()
    def iterate(self, batch: ForwardBatch, args: ExecutionArgs) -> Generator[Event, None, ForwardBatch]:
        """The batch with denoised `latents`.

        Raises:
            KinetoscopeError: the result is not finite (broken weights, or a dtype that overflows).
        """
        engine = self.engine(batch)
        state = engine.strategy.prepare(batch, args)
        yield from engine.iterate(state)
        batch = engine.strategy.postprocess(state)
        assert batch.latents is not None
        check_finite(batch.latents)
        return batch

    def joins(self, batch: ForwardBatch) -> bool:
        """Whether the samples of a batch would share forwards as runs of their own (`engine.batching`)."""
        alone = any(isinstance(hook, Interceptor) for hook in [*self.hooks, *batch.hooks])
        return isinstance(self.strategy_cls(self), StandardStrategy) and not alone

    @torch.no_grad()
    def iterate_together(
        self, batches: Sequence[ForwardBatch], args: ExecutionArgs
    ) -> Generator[Event, None, list[ForwardBatch | Exception]]:
        """Denoise several batches at once, their steps in common forwards.

        Returns:
            each batch with denoised `latents`, or the error that ended it (of `ExecutionArgs.run_errors`; another
            ends them all).
        """
        batcher = StepBatcher()
        started: list[BatchedRun | Exception] = []
        for batch in batches:
            try:
                engine = self.engine(batch)
                started.append(batcher.add(engine, engine.strategy.prepare(batch, args)))
            except args.run_errors as error:
                started.append(error)
        for _, event in batcher.drain():
            yield event
        return [run if isinstance(run, Exception) else _outcome(run, args) for run in started]


def _outcome(run: BatchedRun, args: ExecutionArgs) -> ForwardBatch | Exception:
    """Return the batch of a run that has ended, with its result, or what ended it."""
    if run.error is not None:
        return run.error
    try:
        batch = run.engine.strategy.postprocess(run.state)
        assert batch.latents is not None
        check_finite(batch.latents)
    except args.run_errors as error:
        return error
    return batch


def check_finite(latents: Tensor) -> None:
    """Refuse a result that is not numbers.

    Raises:
        KinetoscopeError: some are not finite (broken weights, or a dtype that overflows).
    """
    if not torch.isfinite(latents).all():
        raise not_finite()


def not_finite() -> KinetoscopeError:
    """Return the error of a result that is not numbers."""
    return KinetoscopeError("denoising gave values that are not finite; try dtype float32, or check the weights")
