"""The engine's promises, on strategies of a few lines that record the order of events."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from engine.fakes import (
    AddingInterceptor,
    DoublingInterceptor,
    FakeBlockStrategy,
    FakeStrategy,
    RecordingHook,
    make_batch,
)
from kinetoscope.core.context import current_context
from kinetoscope.core.errors import CompositionError, ConfigError, RunCancelled
from kinetoscope.core.types import ExecutionArgs
from kinetoscope.engine.engine import DenoisingEngine
from kinetoscope.engine.hooks import PerfLoggingHook, ProgressHook, StepTraceHook
from kinetoscope.engine.hooks.base import Hook
from kinetoscope.engine.protocols import BlockDenoisingStrategy, DenoisingStrategy, split_rows, take_rows

ARGS = ExecutionArgs()


def closed_form(x: torch.Tensor, steps: int, scale: float) -> torch.Tensor:
    """What FakeStrategy computes, written out: uncond = x, cond = x + 1."""
    for _ in range(steps):
        x = x - 0.1 * (x + scale)
    return x


def test_fakes_are_strategies() -> None:
    assert isinstance(FakeStrategy([]), DenoisingStrategy)
    assert not isinstance(FakeStrategy([]), BlockDenoisingStrategy)
    assert isinstance(FakeBlockStrategy([]), BlockDenoisingStrategy)


def test_run_computes_the_closed_form() -> None:
    start = FakeStrategy([]).prepare(make_batch(2), ARGS).latents
    result = DenoisingEngine(FakeStrategy([])).run(make_batch(2), ARGS)
    assert result.latents is not None
    torch.testing.assert_close(result.latents, closed_form(start, 3, 2.0))


@pytest.mark.parametrize(("cfg", "forwards"), [("sequential", 2), ("batched", 1), ("auto", 1)])
def test_row_plans_agree(cfg: str, forwards: int) -> None:
    log: list[Any] = []
    result = DenoisingEngine(FakeStrategy(log)).run(make_batch(2), ExecutionArgs(cfg=cfg))
    reference = DenoisingEngine(FakeStrategy([])).run(make_batch(2), ExecutionArgs(cfg="sequential"))
    assert len(log) == 3 * forwards
    assert torch.equal(result.latents, reference.latents)


def test_auto_runs_large_steps_sequentially() -> None:
    from kinetoscope.engine.protocols import ModelInputs
    from kinetoscope.engine.rows import plan_rows

    big = ModelInputs(torch.zeros(2, 1, 20, 30, 30), torch.zeros(2), ("uncond", "cond"), 1)
    rows, why = plan_rows(big, "auto")
    assert rows == ((0, 1), (1, 2)) and "sequential" in why and str(2 * 20 * 30 * 30) in why


def test_unknown_row_plan_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"sideways.*sequential"):
        DenoisingEngine(FakeStrategy([])).run(make_batch(), ExecutionArgs(cfg="sideways"))


def test_order_of_events_in_a_step_run() -> None:
    log: list[Any] = []
    outer, inner = RecordingHook(log, "outer", 1), RecordingHook(log, "inner", 2)
    DenoisingEngine(FakeStrategy(log, steps=1), [inner, outer]).run(make_batch(), ARGS)
    assert log == [
        ("outer", "run_start"),
        ("inner", "run_start"),
        ("outer", "step_start", 0),
        ("inner", "step_start", 0),
        ("forward", ("uncond", "cond")),
        ("inner", "step_end", 0),
        ("outer", "step_end", 0),
        ("inner", "run_end", None),
        ("outer", "run_end", None),
    ]


def test_order_of_events_in_a_block_run() -> None:
    log: list[Any] = []
    engine = DenoisingEngine(FakeBlockStrategy(log, steps=1), [RecordingHook(log)])
    engine.run_blocks(make_batch(), ARGS)
    expected: list[Any] = [("recording", "run_start")]
    for i in range(3):
        expected += [
            ("init", i),
            ("recording", "block_start", i),
            ("recording", "step_start", 0),
            ("forward", ("uncond", "cond")),
            ("recording", "step_end", 0),
            ("update", i),
            ("forward", ("cond",)),
            ("recording", "block_end", i),
        ]
    assert log == [*expected, ("recording", "run_end", None)]


def test_events_tell_where_a_run_is() -> None:
    strategy = FakeBlockStrategy([], steps=2)
    events = list(DenoisingEngine(strategy).iterate(strategy.prepare(make_batch(), ARGS)))
    kinds = [e.kind for e in events]
    assert kinds == ["run_start"] + ["block_start", "step", "step", "block_end"] * 3 + ["run_end"]
    assert [e.block for e in events if e.kind == "step"] == [0, 0, 1, 1, 2, 2]
    assert all(e.num_blocks == 3 for e in events if e.block is not None)


def test_a_stream_equals_the_offline_run() -> None:
    log: list[Any] = []
    engine = DenoisingEngine(FakeBlockStrategy(log), [RecordingHook(log)])
    offline = engine.run_blocks(make_batch(), ARGS)
    offline_log, log[:] = list(log), []
    stream = engine.streaming_reset(make_batch(), ARGS)
    blocks = [engine.streaming_step(stream, i) for i in range(3)]
    streamed = engine.streaming_clear(stream)
    assert torch.equal(streamed.latents, offline.latents)
    assert [b.shape for b in blocks] == [(1, 1, 2, 2, 2)] * 3
    assert log == offline_log


def test_two_streams_interleave_without_touching() -> None:
    engine = DenoisingEngine(FakeBlockStrategy([]), [StepTraceHook()])
    alone = [engine.run_blocks(make_batch(seed=s), ARGS).latents for s in (1, 2)]
    streams = [engine.streaming_reset(make_batch(seed=s), ARGS) for s in (1, 2)]
    for i in range(3):
        for stream in streams:
            engine.streaming_step(stream, i)
    results = [engine.streaming_clear(s) for s in streams]
    assert all(torch.equal(r.latents, a) for r, a in zip(results, alone, strict=True))
    assert all(len(r.logging_info["step_trace"]) == 9 for r in results)


def test_a_closed_stream_refuses_steps() -> None:
    engine = DenoisingEngine(FakeBlockStrategy([]))
    stream = engine.streaming_reset(make_batch(), ARGS)
    engine.streaming_clear(stream)
    with pytest.raises(CompositionError, match="closed"):
        engine.streaming_step(stream, 0)


def test_a_failing_block_closes_the_stream() -> None:
    log: list[Any] = []
    engine = DenoisingEngine(FakeBlockStrategy([], fail_at=1), [RecordingHook(log)])
    stream = engine.streaming_reset(make_batch(), ARGS)
    with pytest.raises(ValueError, match="broke"):
        engine.streaming_step(stream, 0)
    assert log[-1] == ("recording", "run_end", "ValueError")
    with pytest.raises(CompositionError):
        engine.streaming_step(stream, 1)


def test_a_listener_that_fails_closes_the_stream() -> None:
    """Also then the hooks end at once, though the stream itself is still held."""
    log: list[Any] = []
    engine = DenoisingEngine(FakeBlockStrategy([]), [RecordingHook(log)])
    stream = engine.streaming_reset(make_batch(), ARGS)

    def fail(event: Any) -> None:
        raise ValueError(event.kind)

    with pytest.raises(ValueError, match="block_start"):
        engine.streaming_step(stream, 0, fail)
    assert stream.closed and log[-1] == ("recording", "run_end", "GeneratorExit")


def test_step_strategies_do_not_stream() -> None:
    engine = DenoisingEngine(FakeStrategy([]))
    for call in (engine.run_blocks, engine.streaming_reset):
        with pytest.raises(CompositionError, match="FakeStrategy"):
            call(make_batch(), ARGS)


def test_closing_ends_the_hooks() -> None:
    log: list[Any] = []
    strategy = FakeStrategy([])
    engine = DenoisingEngine(strategy, [RecordingHook(log), PerfLoggingHook()])
    state = strategy.prepare(make_batch(), ARGS)
    events = engine.iterate(state)
    next(events), next(events)
    events.close()
    assert log[-1] == ("recording", "run_end", "GeneratorExit")
    assert len(state.batch.logging_info["denoising_perf"]["steps_ms"]) == 1
    assert not state.scratch


def test_an_error_ends_every_hook_even_if_one_end_fails() -> None:
    class BadEnd(Hook):
        name = "bad-end"
        order = 500

        def on_run_end(self, state: Any, error: BaseException | None) -> None:
            raise RuntimeError("the end failed")

    log: list[Any] = []
    engine = DenoisingEngine(FakeStrategy([], fail_at=1), [RecordingHook(log), BadEnd()])
    with pytest.raises(RuntimeError, match="the end failed"):
        engine.run(make_batch(), ARGS)
    assert log[-1][:2] == ("recording", "run_end")


def test_interceptors_nest_by_order() -> None:
    plain = DenoisingEngine(FakeStrategy([], steps=1, scale=1.0)).run(make_batch(), ARGS).latents
    start = FakeStrategy([]).prepare(make_batch(), ARGS).latents
    for hooks in ([AddingInterceptor(), DoublingInterceptor()], [DoublingInterceptor(), AddingInterceptor()]):
        got = DenoisingEngine(FakeStrategy([], steps=1, scale=1.0), hooks).run(make_batch(), ARGS).latents
        network = (start - plain) / 0.1
        torch.testing.assert_close(got, start - 0.1 * 2 * (network + 1))


def test_conflicting_hooks_are_refused_by_name() -> None:
    class Jealous(Hook):
        name = "jealous"
        conflicts = frozenset({"adding"})

    with pytest.raises(CompositionError, match=r"'jealous'.*'adding'"):
        DenoisingEngine(FakeStrategy([]), [AddingInterceptor(), Jealous()])
    with pytest.raises(CompositionError, match="twice"):
        DenoisingEngine(FakeStrategy([]), [PerfLoggingHook(), PerfLoggingHook()])


def test_the_context_is_open_only_during_a_forward() -> None:
    seen: list[Any] = []

    class Looking(FakeStrategy):
        def forward(self, state: Any, model_inputs: Any) -> torch.Tensor:
            seen.append(current_context())
            return super().forward(state, model_inputs)

    table: dict[str, Any] = {"self": object()}
    strategy = Looking([])
    for _ in DenoisingEngine(strategy).iterate(strategy.prepare(make_batch(), ExecutionArgs(attention=table))):
        assert current_context() is None
    assert seen and all(c.attention is table for c in seen)


def test_perf_logging_and_progress() -> None:
    ticks: list[tuple[int, int]] = []
    hooks = [PerfLoggingHook(), ProgressHook(lambda done, of: ticks.append((done, of)))]
    perf = DenoisingEngine(FakeStrategy([]), hooks).run(make_batch(), ARGS).logging_info["denoising_perf"]
    assert len(perf["steps_ms"]) == 3
    assert sum(perf["steps_ms"]) <= perf["total_ms"]
    assert ticks == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("strategy", [FakeStrategy([]), FakeBlockStrategy([])])
def test_cancel_stops_before_the_next_step(strategy: Any) -> None:
    hook = ProgressHook()
    hook.on_step = lambda done, of: hook.cancel.set()
    with pytest.raises(RunCancelled, match="before step 2 of 3"):
        DenoisingEngine(strategy, [hook]).run(make_batch(), ARGS)


def test_the_trace_records_what_was_run() -> None:
    result = DenoisingEngine(FakeStrategy([]), [StepTraceHook()]).run(make_batch(2), ExecutionArgs(cfg="sequential"))
    trace = result.logging_info["step_trace"]
    start = FakeStrategy([]).prepare(make_batch(2), ARGS).latents.flatten(1)
    assert [r["timestep"] for r in trace] == [1000.0, 900.0, 800.0]
    assert trace[0]["rows"] == [["uncond"], ["cond"]]
    assert trace[0]["uncond_norm"] == pytest.approx(start.norm(dim=1).tolist())
    assert trace[0]["cosine"] == pytest.approx(torch.cosine_similarity(start, start + 1).tolist(), abs=1e-6)


def test_rows_of_a_tree_are_split_as_they_are_taken() -> None:
    class Pair(NamedTuple):
        one: torch.Tensor
        other: torch.Tensor | None

    tree = {"pair": Pair(torch.arange(6.0).view(3, 2), None), "list": [torch.arange(3)], "tuple": (torch.ones(3, 1), 7)}
    rows = split_rows(tree, 3)
    for index, row in enumerate(rows):
        expected = take_rows(tree, slice(index, index + 1))
        assert torch.equal(row["pair"].one, expected["pair"].one) and row["pair"].other is None
        assert torch.equal(row["list"][0], expected["list"][0]) and type(row["list"]) is list
        assert torch.equal(row["tuple"][0], expected["tuple"][0]) and row["tuple"][1] == 7
        assert row["pair"].one.data_ptr() == expected["pair"].one.data_ptr()
    assert len(rows) == 3 and split_rows({}, 2) == [{}, {}]
