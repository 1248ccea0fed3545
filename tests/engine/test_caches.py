"""Step caches on a toy network: each against its rule written out, and rows that know nothing of each other."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.fakes import FakeStrategy, make_batch
from kinetoscope.core.context import ForwardContext, StepInfo, forward_context
from kinetoscope.core.errors import CompositionError, InputError
from kinetoscope.core.types import ExecutionArgs
from kinetoscope.diffusion.guidance import Guidance
from kinetoscope.diffusion.noise import NoiseSource
from kinetoscope.engine.engine import DenoisingEngine
from kinetoscope.engine.hooks import StepTraceHook
from kinetoscope.engine.hooks.caches import (
    CACHES,
    CacheCalibration,
    DBCache,
    FBCache,
    MagCache,
    StepCache,
    TaylorSeer,
    TeaCache,
    fit_coefficients,
    magnitude_ratios,
)
from kinetoscope.engine.hooks.caches.calibration import Measured
from kinetoscope.engine.hooks.caches.magcache import nearest_index
from kinetoscope.engine.hooks.caches.rows import can_cut, cut_calls
from kinetoscope.engine.protocols import BlockContext, BlockPlan, ModelInputs, StrategyState
from kinetoscope.nn.stack import BlockCall, join_tokens, run_blocks

STEPS, WIDTH, LAYERS = 20, 4, 5
SEEDS = [3, 4, 5]
WEIGHTS = torch.randn(LAYERS, WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))


class Block:
    """x + tanh(x W + text) time, and a count of the rows it was given; a memory of rows is written over."""

    def __init__(self, layer: int) -> None:
        self.layer, self.rows = layer, 0

    def __call__(self, x: Tensor, text: Tensor, time: Tensor, memory: Tensor | None = None) -> Tensor:
        self.rows += x.shape[0]
        if memory is not None:
            assert memory.shape[0] == x.shape[0]
            memory.copy_(x.mean(1))
        return x + 0.3 * torch.tanh(x @ WEIGHTS[self.layer] + text) * time

    def both(self, x: Tensor, words: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        return self(x, text, time), words + 0.1 * x.mean(1, keepdim=True)


class Toy(FakeStrategy):
    """Branches and samples differ by their text; `kind`: "plain", "memory" (rows in what is shared) or "streams"."""

    def __init__(self, kind: str = "plain", experts: int = 1, guided: bool = True) -> None:
        super().__init__([], STEPS, 3.0 if guided else 1.0)
        self.kind, self.networks = kind, [[Block(i) for i in range(LAYERS)] for _ in range(experts)]

    def prepare(self, batch: Any, args: ExecutionArgs) -> StrategyState:
        noise = NoiseSource(batch.seeds)
        latents = noise.draw((1, 2, 2, WIDTH))
        times = [float(1000 - 50 * i) for i in range(STEPS)]
        return StrategyState(batch, args, latents, Guidance(self.scale), noise, times)

    def make_model_inputs(self, state: StrategyState, t: float, step_idx: int) -> ModelInputs:
        branches, batch = state.guidance.branches, state.latents.shape[0]
        rows = len(branches) * batch
        seeds = torch.tensor(state.batch.seeds).repeat(len(branches)).view(-1, 1, 1)
        text = torch.sin(seeds * 1.7 + torch.arange(len(branches)).repeat_interleave(batch).view(-1, 1, 1))
        latents = state.latents.repeat(len(branches), 1, 1, 1, 1)
        return ModelInputs(latents, torch.full((rows,), t), branches, batch, {"text": text})

    def forward(self, state: StrategyState, model_inputs: ModelInputs) -> Tensor:
        x = model_inputs.latents.flatten(1, -2)
        share = model_inputs.timestep[0] / 1000
        time = torch.stack([share, share.square(), torch.ones_like(share), torch.cos(3 * share)]).view(1, 1, WIDTH)
        rows = {"text": model_inputs.conditioning["text"], "time": time}
        blocks = self.networks[int(len(self.networks) > 1 and float(share) < 0.5)]
        if self.kind == "streams":
            calls = [BlockCall(b.both, rows) for b in blocks[:2]] + [BlockCall(join_tokens)]
            words = rows["text"].expand(-1, 3, WIDTH)
            joined = run_blocks((x, words), calls + [BlockCall(b, rows) for b in blocks[2:]])
            return joined[:, : x.shape[1]].view(model_inputs.latents.shape)
        memory = {"memory": torch.zeros(x.shape[0], WIDTH)} if self.kind == "memory" else {}
        return run_blocks(x, [BlockCall(b, rows, memory) for b in blocks]).view(model_inputs.latents.shape)

    @property
    def computed(self) -> int:
        """Rows that the last block but one was run for."""
        return sum(blocks[-2].rows for blocks in self.networks)


def run(toy: Toy, hooks: Sequence[Any], seeds: Sequence[int] = SEEDS, cfg: str = "batched") -> Any:
    batch = make_batch(len(seeds))
    batch.seeds = list(seeds)
    return DenoisingEngine(toy, [*hooks, StepTraceHook()]).run(batch, ExecutionArgs(cfg=cfg))


def decisions(batch: Any) -> dict[tuple[str, int], list[tuple[bool, float | None]]]:
    """(branch, sample) -> whether each step was skipped, and its score."""
    found: dict[tuple[str, int], list[tuple[bool, float | None]]] = {}
    for record in batch.logging_info["step_trace"]:
        for row in record["cache"]:
            found.setdefault((row["branch"], row["sample"]), []).append((row["skipped"], row["score"]))
    return found


GENERATOR = np.random.default_rng(1)
RATIOS = {b: [1.0, *(1 + 0.04 * GENERATOR.standard_normal(STEPS - 1))] for b in ("uncond", "cond")}
COEFFICIENTS = (30.0, -8.0, 0.5, 0.7, 0.003)
MAKERS: dict[str, Callable[[], StepCache]] = {
    "fbcache": lambda: FBCache(0.09),
    "dbcache": lambda: DBCache(0.12, first=2, last=1, warmup=3, limit=2),
    "taylorseer": lambda: TaylorSeer(interval=4, order=2),
    "magcache": lambda: MagCache(RATIOS),
    "teacache": lambda: TeaCache(COEFFICIENTS, 0.08, warmup=3),
}
each = pytest.mark.parametrize("name", MAKERS)


# -- each rule, written out -------------------------------------------------------------------------------------------


def magcache_by_hand(ratios: Sequence[float], threshold: float, limit: int, retention: float) -> list[bool]:
    skips: list[bool] = []
    product, error, run = 1.0, 0.0, 0
    for index, ratio in enumerate(ratios):
        skip = False
        if index >= int(retention * len(ratios) + 0.5):
            product, run = product * ratio, run + 1
            error += abs(1 - product)
            skip = index > 0 and error <= threshold and run <= limit
        if not skip:
            product, error, run = 1.0, 0.0, 0
        skips.append(skip)
    return skips


@pytest.mark.parametrize(("threshold", "limit", "retention"), [(0.06, 3, 0.2), (0.2, 2, 0.0), (0.03, 5, 0.5)])
def test_magcache_skips_what_its_ratios_say(threshold: float, limit: int, retention: float) -> None:
    found = decisions(run(Toy(), [MagCache(RATIOS, threshold, limit, retention)]))
    for (branch, _), got in found.items():
        expected = magcache_by_hand(RATIOS[branch], threshold, limit, retention)
        assert [skip for skip, _ in got] == expected and 0 < sum(expected) < STEPS
    assert found["cond", 0] != found["uncond", 0]


def test_magcache_reads_the_nearest_step_of_its_calibration() -> None:
    assert [nearest_index(i, 4, 7) for i in range(4)] == [0, 2, 4, 6]
    assert [nearest_index(i, 7, 4) for i in range(7)] == [0, 0, 1, 2, 2, 2, 3]  # halves to even
    assert nearest_index(0, 1, 7) == 6
    cache = MagCache({"cond": [1.0, 2.0, 3.0]})
    assert [cache.gamma("cond", i, 5) for i in range(5)] == [1.0, 1.0, 2.0, 3.0, 3.0]
    with pytest.raises(CompositionError, match=r"cond.*not for 'uncond'"):
        cache.gamma("uncond", 0, 3)


@pytest.mark.parametrize(("interval", "warmup", "end"), [(5, 3, 0), (2, 1, 0), (1, 3, 0), (4, 6, 15)])
def test_taylorseer_runs_at_its_interval(interval: int, warmup: int, end: int) -> None:
    toy = Toy()
    found = decisions(run(toy, [TaylorSeer(interval, warmup, end=end)]))
    full = {*range(warmup), *range(warmup + 1, STEPS, interval), *(range(end, STEPS) if end else ())}
    if (-1) % interval == 0:  # the step right after the warm-up, where every step is due
        full.add(warmup)
    assert all({i for i, (skip, _) in enumerate(got) if not skip} == full for got in found.values())
    assert toy.computed == len(full) * len(found)


@pytest.mark.parametrize("target", ["residual", "output"])
def test_taylorseer_continues_a_line_exactly(target: str) -> None:
    """What grows evenly from step to step is foretold to rounding; the rule is checked by diffusers' own elsewhere."""

    def block(x: Tensor, t: float) -> Tensor:
        return x + (5.0 + 0.25 * t) * torch.arange(3.0)

    cache, state = TaylorSeer(interval=4, warmup=2, target=target), bare_state()
    for index in range(12):
        x = torch.full((1, 2, 3), float(index) if target == "residual" else 1.0)
        got = stack(cache, state, index, x, [BlockCall(block, shared={"t": float(index)})])
        assert torch.allclose(got, block(x, float(index)), rtol=1e-6)
    assert state.batch.logging_info["step_cache"]["skipped"] > 5


def teacache_by_hand(signals: Sequence[Tensor], threshold: float, warmup: int) -> list[bool]:
    skips, change = [False], 0.0
    for index in range(1, len(signals)):
        r = float((signals[index] - signals[index - 1]).abs().mean() / signals[index - 1].abs().mean())
        change = change + float(np.polyval(COEFFICIENTS, r)) if index >= warmup else 0.0
        skips.append(index >= warmup and change < threshold)
        change *= skips[-1]
    return skips


def test_teacache_skips_what_the_time_says() -> None:
    shares = [1 - i / STEPS for i in range(STEPS)]
    signals = [torch.tensor([s, s * s, 1.0, np.cos(3 * s)], dtype=torch.float32) for s in shares]
    found = decisions(run(Toy(), [TeaCache(COEFFICIENTS, 0.08, warmup=3)]))
    expected = teacache_by_hand(signals, 0.08, 3)
    assert 0 < sum(expected) < STEPS - 3
    assert all([skip for skip, _ in got] == expected for got in found.values())


def test_teacache_is_of_one_network() -> None:
    with pytest.raises(CompositionError, match="two experts"):
        run(Toy(experts=2), [TeaCache(COEFFICIENTS)])


@pytest.mark.parametrize(("first", "last", "warmup", "limit"), [(1, 0, 0, 0), (2, 1, 4, 2)])
def test_fbcache_against_the_rule_written_out(first: int, last: int, warmup: int, limit: int) -> None:
    """One row, block by block."""
    toy, threshold = Toy(guided=False), 0.09
    got = run(toy, [FBCache(threshold, first, last, warmup, limit)], seeds=[3])

    oracle = Toy(guided=False)
    state = oracle.prepare(_seeded([3]), ExecutionArgs())
    probe = tail = None
    skips: list[bool] = []
    in_row = 0
    for index, t in enumerate(state.times):
        inputs = oracle.make_model_inputs(state, t, index)

        def slow(x: Tensor, calls: Sequence[BlockCall], index: int = index) -> Tensor:
            nonlocal probe, tail, in_row
            h = x
            for call in calls[:first]:
                h = call.block(h, **call.rows)
            r = h - x
            small = probe is not None and float((r - probe).abs().mean() / probe.abs().mean()) <= threshold
            skips.append(small and index >= warmup and (limit == 0 or in_row < limit))
            if skips[-1]:
                in_row, m = in_row + 1, h + tail
            else:
                m = h
                for call in calls[first : LAYERS - last]:
                    m = call.block(m, **call.rows)
                probe, tail, in_row = r, m - h, 0
            for call in calls[LAYERS - last :]:
                m = call.block(m, **call.rows)
            return m

        with forward_context(ForwardContext(stack=slow)):
            state.latents = oracle.scheduler_step(state, oracle.forward(state, inputs), t)
    assert 3 < sum(skips) < STEPS - 3
    assert [skip for skip, _ in decisions(got)["cond", 0]] == skips
    assert torch.allclose(got.latents, state.latents, rtol=0, atol=1e-6)


# -- whose memory is whose --------------------------------------------------------------------------------------------


def same_alone_and_together(make: Callable[[], StepCache], kind: str = "plain", mixed: bool = False) -> None:
    """Rows of two branches and three samples, in one forward, in one a branch, and each sample alone.

    `mixed`: what is compared must have steps in which some rows ran and others did not.
    """
    together, apart = Toy(kind), Toy(kind)
    batched, sequential = run(together, [make()]), run(apart, [make()], cfg="sequential")
    steps = list(zip(*([skip for skip, _ in row] for row in decisions(batched).values()), strict=True))
    assert not mixed or sum(0 < sum(step) < len(step) for step in steps) > 2
    assert any(any(step) for step in steps)
    assert decisions_agree(batched, sequential)
    assert (batched.latents - sequential.latents).abs().max() <= 1e-5 * batched.latents.std()
    for i, seed in enumerate(SEEDS):
        alone = run(Toy(kind), [make()], seeds=[seed])
        assert (alone.latents - batched.latents[i : i + 1]).abs().max() <= 1e-5 * batched.latents.std()


def decisions_agree(a: Any, b: Any) -> bool:
    return {k: [s for s, _ in v] for k, v in decisions(a).items()} == {
        k: [s for s, _ in v] for k, v in decisions(b).items()
    }


@each
@pytest.mark.parametrize("kind", ["plain", "memory", "streams"])
def test_a_row_is_the_same_alone_and_among_others(name: str, kind: str) -> None:
    same_alone_and_together(MAKERS[name], kind, mixed=name in ("fbcache", "dbcache", "magcache"))


class Confused(FBCache):
    """Takes what the other branches remember for its own."""

    def _rows(self, run: Any, keys: Any, step: Any, calls: Any) -> list[Any]:
        return super()._rows(run, [("one for all", sample) for _, sample in keys], step, calls)


class Reversed(FBCache):
    """Gives each row what another row cached."""

    def estimate(self, row: Any, look: Any, before: Tensor) -> Tensor:
        others = list(self.seen)
        other = others[(others.index(row.residual.data_ptr()) + 1) % len(others)]
        return before + self.seen[other]

    def store(self, row: Any, look: Any, before: Tensor, after: Tensor) -> None:
        super().store(row, look, before, after)
        self.seen = {**getattr(self, "seen", {}), row.residual.data_ptr(): row.residual}


@pytest.mark.parametrize("wrong", [Confused, Reversed])
def test_a_cache_with_another_branch_s_state_is_caught(wrong: type[FBCache]) -> None:
    same_alone_and_together(lambda: FBCache(0.09))
    with pytest.raises(AssertionError):
        same_alone_and_together(lambda: wrong(0.09))


@each
def test_only_rows_that_need_it_run(name: str) -> None:
    toy = Toy()
    batch = run(toy, [MAKERS[name]()])
    total = batch.logging_info["step_cache"]
    assert total == {"name": name, "rows": 6 * STEPS, "skipped": 6 * STEPS - toy.computed}
    assert total["skipped"] == sum(skip for row in decisions(batch).values() for skip, _ in row) > 0


def test_where_rows_are_in_what_all_share_all_run() -> None:
    """The cached rows take what they have cached all the same: the latents are those of the plain toy."""
    toy = Toy("memory")
    batch = run(toy, [FBCache(0.09)])
    assert toy.computed > 6 * STEPS - batch.logging_info["step_cache"]["skipped"]
    assert torch.allclose(batch.latents, run(Toy(), [FBCache(0.09)]).latents, rtol=0, atol=1e-6)


@each
def test_interleaved_runs_do_not_see_each_other(name: str) -> None:
    alone = [run(Toy(), [MAKERS[name]()], seeds=[seed]).latents for seed in (3, 4)]
    engine = DenoisingEngine(Toy(), [MAKERS[name]()])
    states = [engine.strategy.prepare(_seeded([seed]), ExecutionArgs(cfg="batched")) for seed in (3, 4)]
    runs = [engine.iterate(state) for state in states]
    for _ in itertools.zip_longest(*runs):
        pass
    assert all(torch.equal(state.latents, expected) for state, expected in zip(states, alone, strict=True))
    assert all(not state.scratch for state in states)


@each
def test_nothing_skipped_is_bit_equal(name: str) -> None:
    never: dict[str, StepCache] = {
        "fbcache": FBCache(0.0), "dbcache": DBCache(0.0, first=2, last=1), "taylorseer": TaylorSeer(interval=1),
        "magcache": MagCache(RATIOS, retention=1.0), "teacache": TeaCache(COEFFICIENTS, 0.0),
    }  # fmt: skip
    assert torch.equal(run(Toy(), [never[name]]).latents, run(Toy(), []).latents)


# -- when memory is dropped -------------------------------------------------------------------------------------------


class Blocks(Toy):
    """Two blocks of ten steps, each followed by a pass that is no step."""

    def block_plan(self, state: StrategyState) -> BlockPlan:
        return BlockPlan((0, 1))

    def init_block_context(self, state: StrategyState, item: int, idx: int) -> BlockContext:
        state.latents = state.noise.fork(item).draw((1, 2, 2, WIDTH))
        return BlockContext(idx)

    def process_block(self, state: StrategyState, ctx: BlockContext, item: int):
        yield from ctx.steps(state.times[10:])

    def update_context(self, state: StrategyState, ctx: BlockContext, item: int) -> None:
        before = self.computed
        ctx.forward(self.make_model_inputs(state, 0.0, 0))
        assert self.computed == before + 2 * len(state.batch.seeds)  # whatever a step would have done
        ctx.result = state.latents


@each
def test_a_block_starts_with_nothing_and_its_clean_pass_runs(name: str) -> None:
    cache: Any = MAKERS[name]()
    if name in ("fbcache", "dbcache"):
        cache.threshold = 0.6
    batch = run(Blocks(), [cache])
    assert [r["block"] for r in batch.logging_info["step_trace"]] == [0] * 10 + [1] * 10
    for got in decisions(batch).values():
        assert [skip for skip, _ in got][0::10] == [False, False]
        assert any(skip for skip, _ in got[10:])


@pytest.mark.parametrize("name", ["fbcache", "taylorseer", "magcache"])
def test_an_expert_starts_with_nothing(name: str) -> None:
    toy = Toy(experts=2)
    found = decisions(run(toy, [MAKERS[name]()]))
    change = next(i for i in range(STEPS) if (1000 - 50 * i) / 1000 < 0.5)
    assert all(not row[change][0] for row in found.values())
    one = decisions(run(Toy(), [MAKERS[name]()]))
    assert [r[:change] for r in found.values()] == [r[:change] for r in one.values()]
    assert any(r[change:] != o[change:] for r, o in zip(found.values(), one.values(), strict=True))


def test_a_branch_that_paused_starts_with_nothing() -> None:
    """Guidance may leave a branch out of some steps; what it had cached is too old then."""
    cache, state = FBCache(100.0), bare_state()
    calls = [BlockCall(Block(i), {"text": torch.zeros(1, 1, WIDTH), "time": torch.ones(1, 1, WIDTH)}) for i in (0, 1)]
    x = torch.ones(1, 2, WIDTH)
    for index in (0, 1, 2, 4, 5):
        stack(cache, state, index, x, calls)
    assert [block.block.rows for block in calls] == [5, 2]  # steps 0 and 4 ran in full


# -- what a forward is made of ----------------------------------------------------------------------------------------


def test_rows_are_cut_where_they_can_be() -> None:
    text, time = torch.arange(12.0).view(4, 3), torch.ones(1, 3)
    calls = [BlockCall(join_tokens, {"text": (text, None), "time": time}, {"rope": torch.ones(7, 2), "n": 3})]
    assert can_cut(calls, 4)
    assert not can_cut([BlockCall(join_tokens, {}, {"cache": [{"k": torch.ones(4, 2)}]})], 4)
    assert not can_cut([BlockCall(join_tokens, {}, {"cache": torch.ones(2, 2)})], 4)  # a row a sample, of two branches
    x, cut = cut_calls((text, text), calls, [1, 3], 4)
    assert torch.equal(x[1], text[[1, 3]]) and torch.equal(cut[0].rows["text"][0], text[[1, 3]])
    assert cut[0].rows["text"][1] is None and cut[0].rows["time"] is time and cut[0].shared is calls[0].shared
    view, _ = cut_calls(text, calls, [1, 2], 4)
    assert isinstance(view, Tensor) and view.data_ptr() == text[1:].data_ptr()


@pytest.mark.parametrize("first", [1, 2, 3])
def test_a_join_between_blocks_is_no_block(first: int) -> None:
    toy = Toy("streams")
    batch = run(toy, [FBCache(0.2, first=first, last=1)])
    ran = [block.rows for block in toy.networks[0]]
    full = batch.logging_info["step_cache"]["rows"]
    assert ran[:first] == [full] * first and ran[-1] == full
    assert set(ran[first:-1]) == {full - batch.logging_info["step_cache"]["skipped"]} and min(ran) < full


def test_blocks_that_always_run_leave_some_to_skip() -> None:
    with pytest.raises(CompositionError, match=rf"dbcache: first=8 and last=0 leave none of the {LAYERS} blocks"):
        run(Toy(), [DBCache()])


def test_two_caches_are_refused_by_name() -> None:
    made = [MAKERS[name]() for name in MAKERS]
    assert {cache.name for cache in made} == CACHES
    for a, b in itertools.combinations([*made, CacheCalibration()], 2):
        with pytest.raises(CompositionError, match=rf"{a.name}.*{b.name}|{b.name}.*{a.name}"):
            DenoisingEngine(Toy(), [a, b])


@pytest.mark.parametrize(
    "make",
    [
        lambda: FBCache(-1.0), lambda: FBCache(float("nan")), lambda: FBCache(first=0), lambda: FBCache(limit=-1),
        lambda: TaylorSeer(interval=0), lambda: TaylorSeer(warmup=0), lambda: TaylorSeer(target="input"),
        lambda: MagCache({}), lambda: MagCache({"cond": []}), lambda: MagCache(RATIOS, limit=0),
        lambda: MagCache(RATIOS, retention=1.5), lambda: TeaCache([]), lambda: TeaCache(COEFFICIENTS, warmup=0),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(make: Callable[[], StepCache]) -> None:
    with pytest.raises(InputError):
        make()


def test_a_step_that_is_not_finite_runs() -> None:
    cache, state = FBCache(100.0), bare_state()
    for index, value in enumerate((1.0, float("nan"))):
        stack(cache, state, index, torch.full((1, 2, 3), value), [BlockCall(lambda x: 2 * x)] * 2)
    assert state.batch.logging_info["step_cache"]["skipped"] == 0


# -- calibration ------------------------------------------------------------------------------------------------------


def test_calibration_measures_what_is_reused() -> None:
    """Residuals that double, halve and pause; the first step, and the one after the pause, have nothing before."""

    def block(x: Tensor, time: Tensor) -> Tensor:
        return x + time * torch.arange(1.0, 4.0)

    hook, state = CacheCalibration(), bare_state()
    sizes = {0: 1.0, 1: 2.0, 2: 1.0, 4: 7.0, 5: 7.0}
    for index, size in sizes.items():
        stack(hook, state, index, torch.ones(1, 2, 3), [BlockCall(block, {"time": torch.full((1, 1), size)})])
    rounded = [(m.step, m.branch, *(round(v, 4) for v in m[2:] if v is not None)) for m in hook.measured]
    assert rounded == [(1, "cond", 2.0, 1.0, 1.0), (2, "cond", 0.5, 0.5, 0.5), (5, "cond", 1.0, 0.0, 0.0)]


def test_ratios_are_means_over_samples_and_one_where_unknown() -> None:
    measured = [Measured(1, "cond", 2.0, 0.0, None), Measured(1, "cond", 4.0, 0.0, None),
                Measured(2, "uncond", 0.5, 0.0, None)]  # fmt: skip
    assert magnitude_ratios(measured, 3) == {"cond": [1.0, 3.0, 1.0], "uncond": [1.0, 1.0, 0.5]}
    with pytest.raises(InputError, match="nothing was measured"):
        magnitude_ratios([], 3)


def test_the_polynomial_is_found_again() -> None:
    x = np.linspace(0.01, 0.3, 12)
    measured = [Measured(i, "cond", 1.0, float(np.polyval(COEFFICIENTS, v)), float(v)) for i, v in enumerate(x)]
    found, explained = fit_coefficients(measured)
    assert np.allclose(np.polyval(found, x), np.polyval(COEFFICIENTS, x), rtol=1e-6) and explained > 1 - 1e-9
    with pytest.raises(InputError, match="polynomial of degree 4"):
        fit_coefficients(measured[:4])


def test_calibration_changes_nothing_and_measures_the_toy() -> None:
    hook = CacheCalibration()
    assert torch.equal(run(Toy(), [hook]).latents, run(Toy(), []).latents)
    assert len(hook.measured) == 6 * (STEPS - 1) and all(m.signal is not None for m in hook.measured)


# -- helpers ----------------------------------------------------------------------------------------------------------


def _seeded(seeds: Sequence[int]) -> Any:
    batch = make_batch(len(seeds))
    batch.seeds = list(seeds)
    return batch


def bare_state() -> StrategyState:
    """A run whose forwards are given by hand."""
    return Toy().prepare(_seeded([3]), ExecutionArgs())


def stack(
    cache: StepCache | CacheCalibration, state: StrategyState, index: int, x: Tensor, calls: Sequence[BlockCall]
) -> Any:
    """What the cache makes of one row at one step."""
    if index == 0:
        cache.on_run_start(state)
    inputs = ModelInputs(x, torch.zeros(1), ("cond",), 1)
    with forward_context(ForwardContext(step=StepInfo(index, 100, 0.0))):
        return cache.around_forward(lambda _, i: run_blocks(i.latents, calls), state, inputs)
