"""The only denoising loop.

The primitive is a generator of events, `iterate`. `run` and `run_blocks` drain it, `streaming_*` advance it a block
at a time, and closing it at any point runs every hook's `on_run_end`. There is one step body, `_step`, for all of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from kinetoscope.core.context import ForwardContext, StepInfo, current_context, forward_context
from kinetoscope.core.errors import CompositionError
from kinetoscope.core.protocols import check_protocol
from kinetoscope.core.types import ExecutionArgs, ForwardBatch
from kinetoscope.diffusion.guidance import GuidanceRule
from kinetoscope.engine.hooks.base import Hook, Interceptor, arrange
from kinetoscope.engine.protocols import (
    BlockContext,
    BlockDenoisingStrategy,
    DenoisingStrategy,
    Event,
    ModelInputs,
    Step,
    StrategyState,
    wanted_protocol,
)
from kinetoscope.engine.rows import plan_rows
from kinetoscope.nn.stack import check_stack

_UNTIL_CLOSED = object()


class DenoisingEngine:
    """Runs a strategy, step by step or block by block, with hooks.

    The engine keeps no state of a run: many runs may be open on one engine, interleaved in any order.

    Args:
        strategy: what to run.
        hooks: observers and interceptors; they fire in the order each declares, whatever the order given here.

    Raises:
        CompositionError: two hooks conflict, or one is given twice; the strategy or a hook lacks a method.
    """

    def __init__(self, strategy: DenoisingStrategy, hooks: Sequence[Hook] = ()) -> None:
        check_protocol(strategy, wanted_protocol(strategy), "strategy")
        self.strategy = strategy
        self.hooks = arrange(hooks)
        self.interceptors = [h for h in self.hooks if isinstance(h, Interceptor)]

    # -- runs ---------------------------------------------------------------------------------------------------------

    def iterate(self, state: StrategyState) -> Generator[Event, None, None]:
        """Denoise `state` to the end, yielding as it goes. Closing the generator stops the run and ends its hooks."""
        return _events(self.iterate_forwards(state))

    def iterate_forwards(self, state: StrategyState) -> Generator[Event | PendingForward, None, None]:
        """As `iterate`, yielding each step's forward too before it is computed: answer it in its `output`, or not."""
        if isinstance(self.strategy, BlockDenoisingStrategy):
            items = self.strategy.block_plan(state).items
            return self._run(state, self._blocks(state, self.strategy, iter(items), len(items)))
        return self._run(state, self._steps(state, state.times))

    def run(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """A whole run, in steps or in blocks as the strategy asks."""
        state = self.strategy.prepare(batch, args)
        for _ in self.iterate(state):
            pass
        return self.strategy.postprocess(state)

    def run_blocks(self, batch: ForwardBatch, args: ExecutionArgs) -> ForwardBatch:
        """A whole run of a block strategy.

        Raises:
            CompositionError: the strategy does not work in blocks.
        """
        self._block_strategy()
        return self.run(batch, args)

    # -- streams ------------------------------------------------------------------------------------------------------

    def streaming_reset(self, batch: ForwardBatch, args: ExecutionArgs) -> Stream:
        """Open a stream: the run is prepared and its hooks started; blocks come one at a time from `streaming_step`."""
        strategy = self._block_strategy()
        state = strategy.prepare(batch, args)
        inbox: deque[Any] = deque()
        items = iter(lambda: inbox.popleft() if inbox else _UNTIL_CLOSED, _UNTIL_CLOSED)
        stream = Stream(state, inbox, _events(self._run(state, self._blocks(state, strategy, items, None))))
        next(stream.events)  # run_start
        return stream

    def streaming_step(self, stream: Stream, item: Any, on_event: Callable[[Event], None] | None = None) -> Tensor:
        """Denoise one block described by `item`; returns its result [B, C, t, H, W]."""
        if stream.closed:
            raise CompositionError("this stream is closed; open a new one with streaming_reset")
        stream.inbox.append(item)
        try:
            for event in stream.events:
                if on_event:
                    on_event(event)
                if event.kind == "block_end":
                    assert event.latents is not None
                    return event.latents
        except BaseException:
            stream.closed = True
            stream.events.close()  # hooks end here, unless the error came from inside and ended them on its way out
            raise
        raise RuntimeError("the strategy ended its run inside a stream")

    def streaming_clear(self, stream: Stream) -> ForwardBatch:
        """Close a stream: hooks end, and the strategy puts what it keeps into the batch."""
        stream.closed = True
        for _ in stream.events:  # no item is left, so the block loop ends and the hooks see a run that succeeded
            pass
        return self.strategy.postprocess(stream.state)

    def _block_strategy(self) -> BlockDenoisingStrategy:
        if not isinstance(self.strategy, BlockDenoisingStrategy):
            raise CompositionError(f"{type(self.strategy).__name__} denoises in steps, not in blocks; use run")
        return self.strategy

    # -- the loop -----------------------------------------------------------------------------------------------------

    def _run(self, state: StrategyState, body: Iterator[Any]) -> Generator[Any, None, None]:
        check_protocol(state.guidance, GuidanceRule, f"guidance of {type(self.strategy).__name__}")
        with ExitStack() as ends:  # every started hook ends, even when another one's end fails
            ends.callback(state.scratch.clear)
            for hook in self.hooks:
                ends.push(_end_of(hook, state))
                hook.on_run_start(state)
            yield Event("run_start", videos=state.batch.videos)
            yield from body
        yield Event("run_end", videos=state.batch.videos)

    def _blocks(
        self, state: StrategyState, strategy: BlockDenoisingStrategy, items: Iterator[Any], count: int | None
    ) -> Iterator[Any]:
        for index, item in enumerate(items):
            context = strategy.init_block_context(state, item, index)
            context.steps = partial(self._steps, state, context=context, num_blocks=count)
            context.forward = partial(self.forward, state)
            for hook in self.hooks:
                hook.on_block_start(state, context)
            yield Event("block_start", block=index, num_blocks=count, videos=state.batch.videos)
            yield from strategy.process_block(state, context, item)
            strategy.update_context(state, context, item)
            for hook in self.hooks:
                hook.on_block_end(state, context)
            yield Event("block_end", None, index, count, context.result, state.batch.videos)

    def _steps(
        self,
        state: StrategyState,
        times: Sequence[float],
        context: BlockContext | None = None,
        num_blocks: int | None = None,
    ) -> Iterator[Any]:
        block = context.index if context else None
        for index, t in enumerate(times):
            step = state.step = Step(index, len(times), t, block=block)
            yield from self._step(state, step)
            yield Event("step", step, block, num_blocks, state.latents, state.batch.videos)

    def _step(self, state: StrategyState, step: Step) -> Iterator[Any]:
        """The one step body. It yields its forward before computing it, for whoever drives several runs together."""
        for hook in self.hooks:
            hook.on_step_start(state, step)
        inputs = self.strategy.make_model_inputs(state, step.timestep, step.index)
        inputs = inputs.keep(state.guidance.needed(step.index, step.count, state.memory))
        step.branches = inputs.branches
        pending = PendingForward(self, state, inputs)
        yield pending
        step.prediction = pending.compute() if pending.output is None else pending.output
        step.rows, step.why = pending.rows, pending.why
        step.guided = self.strategy.cfg_combine(state, step.prediction)
        state.latents = self.strategy.scheduler_step(state, step.guided, step.timestep)
        if state.batch.solver_chosen and step.index == 0:
            check_stepped(self.strategy, state)
        for hook in reversed(self.hooks):
            hook.on_step_end(state, step)

    def forward(self, state: StrategyState, inputs: ModelInputs, step: Step | None = None) -> Tensor:
        """Network output for rows `inputs`, with all interceptors around it.

        Args:
            step: which step it is part of; None for a pass that is no step.
        """
        call = self._innermost if self.interceptors else self.strategy.forward
        for interceptor in reversed(self.interceptors):
            call = interceptor.bind(call)
        args = state.args
        info = StepInfo(step.index, step.count, step.timestep, step.block) if step else None
        device = args.device.type
        with forward_context(ForwardContext(args.attention, info)):
            if not args.autocast and not torch.is_autocast_enabled(device):  # to enter costs more than to ask
                return call(state, inputs)
            with torch.autocast(device, args.dtype, enabled=args.autocast):
                return call(state, inputs)

    def _innermost(self, state: StrategyState, inputs: ModelInputs) -> Tensor:
        """The strategy's forward; refuses what acts on the loop over blocks where the network has a loop of its own."""
        output = self.strategy.forward(state, inputs)
        context = current_context()
        if context is not None and (context.stack is not None or context.shard is not None):
            option = "a step cache" if context.stack is not None else "sequence parallel (ulysses, ring)"
            parts = getattr(self.strategy, "parts", None)
            check_stack(context, option, getattr(parts, "transformer", self.strategy))
        return output


def check_stepped(strategy: DenoisingStrategy, state: StrategyState) -> None:
    """Refuse a chosen solver that the strategy's step leaves out, after the first step of a run.

    Raises:
        CompositionError: names the solver and the strategy.
    """
    if state.scheduler is not None and not state.scheduler.stepped:
        raise CompositionError(
            f"scheduler={state.batch.params.scheduler!r}: {type(strategy).__name__}.scheduler_step moves the sample "
            "without the solver of the run; leave scheduler out, or step with state.scheduler.step(...)"
        )


class PendingForward:
    """The rows of a step that wait to be forwarded.

    Attributes:
        engine, state: of the run.
        inputs: the rows.
        output: [R, ...], set by whoever forwards them; while it is None the engine does.
        rows, why: forwards they were executed in, and what chose them.
    """

    __slots__ = ("engine", "inputs", "output", "rows", "state", "why")

    def __init__(self, engine: DenoisingEngine, state: StrategyState, inputs: ModelInputs) -> None:
        self.engine, self.state, self.inputs = engine, state, inputs
        self.output: Tensor | None = None
        self.rows: tuple[tuple[int, int], ...] = ()
        self.why = ""

    def compute(self) -> Tensor:
        """Forward the rows alone, in the forwards that the run's plan says."""
        self.rows, self.why = plan_rows(self.inputs, self.state.args.cfg)
        parts = [self.engine.forward(self.state, self.inputs.select(*r), self.state.step) for r in self.rows]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class Stream:
    """An open stream of an engine. Use it only with that engine's `streaming_*` methods."""

    def __init__(self, state: StrategyState, inbox: deque[Any], events: Generator[Event, None, None]) -> None:
        self.state = state
        self.inbox = inbox
        self.events = events
        self.closed = False


def _events(run: Generator[Any, None, None]) -> Generator[Event, None, None]:
    """The events of a run, its forwards left to the engine."""
    try:
        for item in run:
            if isinstance(item, Event):
                yield item
    finally:
        run.close()


def _end_of(hook: Hook, state: StrategyState) -> Callable[..., bool]:
    """An exit callback that tells `hook` how the run ended and lets the error through."""

    def end(kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        hook.on_run_end(state, error)
        return False

    return end
