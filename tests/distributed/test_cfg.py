"""The branches of guidance shared among devices: against one device that forwards them one after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distributed.opened import open_among
from distributed.ranks import run_ranks
from engine.fakes import FakeBlockStrategy, FakeStrategy, make_batch
from engine.test_caches import MAKERS, SEEDS, Toy
from kinetoscope.core.errors import CompositionError
from kinetoscope.core.types import ExecutionArgs
from kinetoscope.diffusion.guidance import Guidance
from kinetoscope.diffusion.noise import NoiseSource
from kinetoscope.engine.engine import DenoisingEngine
from kinetoscope.engine.hooks import StepTraceHook
from kinetoscope.engine.hooks.caches import CacheCalibration
from kinetoscope.engine.hooks.cfg_parallel import CFGParallel, shares
from kinetoscope.engine.protocols import StrategyState
from kinetoscope.engine.rows import PARALLEL
from kinetoscope.loading import resolve_model
from kinetoscope.parallel import Groups, ParallelConfig
from kinetoscope.parallel.comm import SENT
from kinetoscope.parallel.groups import Group
from kinetoscope.runtime.parallel import check_layout
from runtime.families import FAMILIES, edit
from tiny import make_tiny_wan

STEPS = 6
SINGLE = Group("cfg", 1, 0, (0,), None)


class Branches:
    """Guidance by any number of branches; in the steps `alone` the last of them only."""

    def __init__(self, names: str, alone: Sequence[int] = ()) -> None:
        self.branches, self.alone, self.scale = tuple(names), alone, 2.0

    def needed(self, index: int, count: int, memory: Any) -> tuple[str, ...]:
        return self.branches[-1:] if index in self.alone else self.branches

    def combine(self, predictions: Mapping[str, Tensor], index: int = 0, count: int = 1, memory: Any = None) -> Tensor:
        return sum((p / (i + 1) for i, p in enumerate(predictions.values())), torch.tensor(0.0))


class Remembering(FakeStrategy):
    """Each branch of a run adds to a memory of its own, of which its predictions are made: one that a device did not
    keep, or kept twice, shows."""

    def __init__(self, guidance: Any) -> None:
        super().__init__([], STEPS)
        self.guidance = guidance

    def prepare(self, batch: Any, args: ExecutionArgs) -> StrategyState:
        noise = NoiseSource(batch.seeds)
        state = StrategyState(
            batch, args, noise.draw((1, 2, 2, 2)), self.guidance, noise, [float(1000 - i) for i in range(STEPS)]
        )
        state.tables["memory"] = torch.zeros(len(self.guidance.branches) * len(batch.seeds), 1, 2, 2, 2)
        return state

    def make_model_inputs(self, state: StrategyState, t: float, step_idx: int) -> Any:
        inputs = super().make_model_inputs(state, t, step_idx)
        inputs.conditioning["memory"] = state.tables["memory"]
        return inputs

    def forward(self, state: StrategyState, model_inputs: Any) -> Tensor:
        memory = model_inputs.conditioning["memory"]
        memory.add_(super().forward(state, model_inputs).sin())
        return memory * 2.0


class Adaptive(Remembering):
    """Standard guidance, which needs the step."""

    def cfg_combine(self, state: StrategyState, noise_pred: Tensor) -> Tensor:
        step = state.active
        return state.guidance.combine(step.by_branch(), step.index, step.count, state.memory)


class Blocks(FakeBlockStrategy):
    """Blocks of two branches; the pass over a finished block is of one."""


STRATEGIES: dict[str, Any] = {
    "two": lambda: Remembering(Branches("ab")),
    "three": lambda: Remembering(Branches("abc")),
    "pauses": lambda: Remembering(Branches("abc", alone=(0, 3))),
    "window": lambda: Adaptive(Guidance.make(3.0, 0.2, "cfg:start=0.3,stop=0.7")),
    "apg": lambda: Adaptive(Guidance.make(3.0, 0.0, "apg:momentum=-0.5,reuse=0.5")),
    "zero": lambda: Adaptive(Guidance.make(3.0, 0.0, "cfg-zero:init=2")),
    "off": lambda: Adaptive(Guidance.make(1.0)),
    "blocks": lambda: Blocks([]),
}


def denoise(strategy: Any, hooks: Sequence[Any], cfg: str) -> dict[str, Any]:
    engine = DenoisingEngine(strategy, [*hooks, StepTraceHook()])
    SENT.clear()
    batch = make_batch(2)
    batch.seeds = SEEDS[:2]
    batch = engine.run(batch, ExecutionArgs(cfg=cfg))
    trace = [{k: v for k, v in t.items() if k not in ("ms", "why", "rows")} for t in batch.logging_info["step_trace"]]
    counts = batch.logging_info.get("step_cache")
    calls = [c[1] for c in strategy.log if c[0] == "forward"]
    return {"latents": batch.latents, "trace": trace, "calls": calls, "sent": SENT["cfg"], "counts": counts}


def denoise_all(groups: Groups) -> dict[str, dict[str, Any]]:
    """Every strategy, and every step cache, with its branches shared."""
    hook = CFGParallel(groups.cfg, lockstep=groups.config.fsdp)
    runs = {name: denoise(make(), [hook], PARALLEL) for name, make in STRATEGIES.items()}
    if groups.cfg.size == 2 and not groups.config.fsdp:
        runs |= {name: denoise(Toy(), [make(), hook], PARALLEL) for name, make in MAKERS.items()}
    return runs


def alone(name: str) -> dict[str, Any]:
    strategy = STRATEGIES[name]() if name in STRATEGIES else Toy()
    return denoise(strategy, [MAKERS[name]()] if name in MAKERS else [], "sequential")


def check_fakes(parallel: str) -> list[dict[str, dict[str, Any]]]:
    ranks = run_ranks(parallel, denoise_all)
    for name in ranks[0]:
        expected = alone(name)
        for rank in ranks:
            np.testing.assert_array_equal(rank[name]["latents"], expected["latents"].numpy(), err_msg=name)
            assert rank[name]["trace"] == expected["trace"], name
            assert rank[name]["counts"] == expected["counts"], name
    return ranks


def test_shares_are_contiguous() -> None:
    assert shares("ab", 2) == [("a",), ("b",)]
    assert shares("abc", 2) == [("a", "b"), ("c",)]
    assert shares("ab", 3) == [("a",), ("b",), ()]


def test_every_device_has_what_one_would_make() -> None:
    """Bit for bit: in memories of branches, guidance that leaves some out, blocks, and under every step cache."""
    a, b = check_fakes("cfg=2")
    assert a["two"]["calls"] == [("a",)] * STEPS and b["two"]["calls"] == [("b",)] * STEPS
    assert a["three"]["calls"] == [("a", "b")] * STEPS and b["three"]["calls"] == [("c",)] * STEPS
    assert len(a["pauses"]["calls"]) == STEPS - 2 and len(b["pauses"]["calls"]) == STEPS
    assert a["off"]["calls"] == b["off"]["calls"] == [("cond",)] * STEPS
    branch = 2 * 8 * 4  # bytes of the predictions of one branch: two samples of eight numbers
    assert (a["two"]["sent"], b["two"]["sent"]) == (STEPS * branch, STEPS * branch)
    assert (a["three"]["sent"], b["three"]["sent"]) == (2 * STEPS * branch, STEPS * branch)
    assert (a["pauses"]["sent"], b["pauses"]["sent"]) == (2 * (STEPS - 2) * branch, STEPS * branch)
    assert a["off"]["sent"] == 0
    for name in MAKERS:
        assert 0 < a[name]["counts"]["skipped"] < a[name]["counts"]["rows"], name


@pytest.mark.distributed
def test_more_devices_than_branches() -> None:
    """A device without a branch waits; or forwards one and drops it, where all must forward."""
    ranks = check_fakes("cfg=3")
    assert [len(r["two"]["calls"]) for r in ranks] == [STEPS, STEPS, 0]
    ranks = check_fakes("cfg=3,fsdp=true")
    assert [len(r[n]["calls"]) for n in ("two", "three", "pauses") for r in ranks] == [STEPS] * 9


def test_the_trace_says_why_and_one_device_changes_nothing() -> None:
    batch = DenoisingEngine(FakeStrategy([]), [CFGParallel(SINGLE), StepTraceHook()]).run(
        make_batch(), ExecutionArgs(cfg=PARALLEL)
    )
    record = batch.logging_info["step_trace"][0]
    assert record["rows"] == [["uncond", "cond"]]
    assert record["why"] == "parallel: each device forwards its share of the branches"
    batched = DenoisingEngine(FakeStrategy([])).run(make_batch(), ExecutionArgs(cfg="batched"))
    assert batch.latents is not None and batched.latents is not None and torch.equal(batch.latents, batched.latents)


def test_calibration_wants_all_branches() -> None:
    with pytest.raises(CompositionError, match=r"'cfg-parallel' and 'cache-calibration' cannot be used together"):
        DenoisingEngine(FakeStrategy([]), [CFGParallel(SINGLE), CacheCalibration()])


# -- families ---------------------------------------------------------------------------------------------------------

GUIDED: dict[str, dict[str, Any]] = {
    "wan": {"guidance_scale": 4.0},
    "wan-a14b": {"guidance_scale": 3.0, "guidance_scale_2": 1.0},
    "causal": {"guidance_scale": 3.0},
    "skyreels": {"guidance_scale": 4.0},
    "cosmos": {"guidance_scale": 4.0},
    "hunyuan": {"extra": {"true_cfg_scale": 3.0}},
    "hunyuan15": {"guidance_scale": 4.0},
    "ltx": {"guidance_scale": 3.0},
    "longcat": {"guidance_scale": 4.0},
}
CACHE = {None: {}, "taylorseer:interval=2,warmup=1": {"num_inference_steps": 4}}


def generate(folder: Path, family: str, cache: str | None, groups: Groups | None) -> dict[str, Any]:
    """Two videos of a family; by one device, or with its branches shared. (Without any interceptor the two would be
    runs of their own, whose matrix products are of other sizes.)"""
    if groups is None:
        generator = open_among(None, folder / family, cfg="sequential", cache=cache, hooks=[CFGParallel(SINGLE)])
    else:
        generator = open_among(groups, folder / family, cache=cache)
    fields = FAMILIES[family].request(trace=True, **GUIDED[family], **(CACHE[cache] if family != "causal" else {}))
    fields |= fields.pop("extra", {})
    SENT.clear()
    results = generator.generate_video(["a cat", "red"], **fields)
    trace = results[0].logging_info["step_trace"]
    return {
        "latents": torch.stack([r.latents for r in results]),
        "norms": [(t["cond_norm"], t["uncond_norm"], t.get("cache")) for t in trace],
        "sent": SENT["cfg"],
    }


def generate_all(groups: Groups | None, folder: Path, families: Sequence[str]) -> dict[tuple[str, Any], Any]:
    return {(f, c): generate(folder, f, c, groups) for f in families for c in CACHE}


def check_families(folder: Path, families: Sequence[str]) -> None:
    for family in families:
        (folder / family).mkdir()
        FAMILIES[family].make(folder / family)
    expected = generate_all(None, folder, families)
    for rank in run_ranks("cfg=2", generate_all, folder, families):
        for key, one in expected.items():
            np.testing.assert_array_equal(rank[key]["latents"], one["latents"].numpy(), err_msg=str(key))
            assert rank[key]["norms"] == one["norms"], key
            guided = sum(uncond is not None for _, uncond, _ in one["norms"])
            assert guided > 0 and rank[key]["sent"] >= guided * one["latents"].nbytes / 8, key


def test_two_families(tmp_path: Path) -> None:
    """Two experts, of which one is not guided; and K/V caches of branches."""
    check_families(tmp_path, ["wan-a14b", "causal"])


@pytest.mark.distributed
def test_every_family(tmp_path: Path) -> None:
    check_families(tmp_path, [f for f in GUIDED if f not in ("wan-a14b", "causal")])


@pytest.mark.parametrize(
    ("parallel", "family", "options", "message"),
    [
        ("cfg=2", "wan", {"cfg": "batched"}, "parallel cfg=2 and cfg='batched' cannot be used together"),
        ("cfg=2,fsdp=true", "wan", {"cache": "fbcache"}, "cfg=2,fsdp=true and cache='fbcache' cannot be used together"),
        ("cfg=2", "fast", {}, r"cfg=2 and \S+ cannot be used together: it is distilled and has one branch"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    tmp_path: Path, parallel: str, family: str, options: dict[str, Any], message: str
) -> None:
    make_tiny_wan(tmp_path)
    if family == "fast":
        edit(tmp_path / "model_index.json", _class_name="WanDMDPipeline")
    with pytest.raises(CompositionError, match=message):
        check_layout(ParallelConfig.of(parallel), resolve_model(str(tmp_path)), options)
