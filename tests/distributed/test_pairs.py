"""Two ways of sharing at once, and ways of sharing with what else changes a run: against one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distributed.opened import open_among
from distributed.ranks import run_ranks
from distributed.test_sequence import EveryStep
from distributed.test_sequence_families import check_videos
from engine.test_caches import COEFFICIENTS, RATIOS
from kinetoscope.engine.hooks.caches import DBCache, FBCache, MagCache, StepCache, TaylorSeer, TeaCache
from kinetoscope.parallel import Groups
from tiny import make_tiny_wan

pytestmark = pytest.mark.distributed

CACHES: dict[str, Callable[[], StepCache]] = {
    "fbcache": lambda: FBCache(0.6, warmup=1),
    "dbcache": lambda: DBCache(0.6, first=1, last=1, warmup=1),
    "taylorseer": lambda: TaylorSeer(interval=2, warmup=1),
    "magcache": lambda: MagCache(RATIOS, threshold=0.5),
    "teacache": lambda: TeaCache(COEFFICIENTS, 50.0, warmup=1),
}


def generate(groups: Groups | None, path: Path, cache: str | None = None) -> dict[str, Any]:
    """The latents at each forward and at the end, and how many evaluations were left out."""
    seen = EveryStep()
    generator = open_among(groups, path, hooks=[seen, *([] if cache is None else [CACHES[cache]()])])
    result = generator.generate_video(
        "a red circle", height=48, width=80, num_frames=9, num_inference_steps=6, seed=3, guidance_scale=4.0
    )
    left_out = result.logging_info.get("step_cache", {}).get("skipped", 0)
    return {"latents": result.latents, "steps": torch.stack(seen.seen), "left_out": left_out}


OPTIONS: dict[str, dict[str, Any]] = {
    "components": {"offload": "components"},
    "blocks": {"offload": "blocks"},
    "int8": {"quantize": "int8"},
    "text": {"text_mode": "true_length"},
    "math": {"attention": "math"},
}
FIELDS: dict[str, dict[str, Any]] = {
    "reuse": {"guidance": "cfg:reuse=0.5"},
    "apg": {"guidance": "apg:momentum=-0.5"},
}


def with_options(groups: Groups | None, path: Path) -> dict[str, Any]:
    """The latents with each of the options that change how, or what, is computed."""
    found: dict[str, Any] = {}
    for name in (*OPTIONS, *FIELDS):
        generator = open_among(groups, path, **OPTIONS.get(name, {}))
        found[name] = generator.generate_video(
            "a red circle", height=48, width=80, num_frames=5, num_inference_steps=4, seed=3, guidance_scale=4.0,
            **FIELDS.get(name, {}),
        ).latents  # fmt: skip
    return found


@pytest.mark.parametrize("parallel", ["ulysses=2", "ring=2", "cfg=2"])
def test_options(tmp_path: Path, parallel: str) -> None:
    make_tiny_wan(tmp_path, layers=3)
    expected = with_options(None, tmp_path)
    for rank in run_ranks(parallel, with_options, tmp_path, seconds=400):
        for name, one in expected.items():
            apart = np.abs(rank[name] - one.numpy()).max() / one.std()
            assert apart <= 1e-4, (name, apart)


def with_each_cache(groups: Groups | None, path: Path) -> dict[str, dict[str, Any]]:
    return {name: generate(groups, path, name) for name in CACHES}


@pytest.mark.parametrize("parallel", ["ulysses=2", "ring=2", "tp=2", "cfg=2"])
def test_every_step_cache(tmp_path: Path, parallel: str) -> None:
    """Decides alike in every process, and as it does in one."""
    make_tiny_wan(tmp_path, layers=3)
    expected = with_each_cache(None, tmp_path)
    for rank in run_ranks(parallel, with_each_cache, tmp_path, seconds=400):
        for name, one in expected.items():
            assert 0 < rank[name]["left_out"] == one["left_out"], name
            apart = np.abs(rank[name]["latents"] - one["latents"].numpy()).max() / one["latents"].std()
            assert apart <= 1e-4, (name, apart)


@pytest.mark.parametrize(
    "parallel",
    ["tp=2", "ulysses=2", "ring=2", "cfg=2", "ulysses=2,fsdp=true", "ulysses=4", "ring=2,tp=2", "cfg=2,ulysses=2"],
)
def test_one_seed_is_one_noise(tmp_path: Path, parallel: str) -> None:
    """Bit for bit in every process of every layout, whoever computes what; steps then differ by rounding only."""
    make_tiny_wan(tmp_path)
    one = generate(None, tmp_path)
    for rank in run_ranks(parallel, generate, tmp_path):
        np.testing.assert_array_equal(rank["steps"][0], one["steps"][0].numpy())
        apart = np.abs(rank["latents"] - one["latents"].numpy()).max() / one["latents"].std()
        assert apart <= 1e-4, apart


@pytest.mark.parametrize("parallel", ["ulysses=2,tp=2", "ring=2,tp=2", "cfg=2,ring=2,fsdp=true"])
def test_pairs(tmp_path: Path, parallel: str) -> None:
    """Of text among the tokens, and of a video that goes on from frames in a K/V cache."""
    check_videos(parallel, tmp_path, ["hunyuan", "longcat-cached"])


@pytest.mark.parametrize("parallel", ["tp=2"])
def test_streams(tmp_path: Path, parallel: str) -> None:
    """Frames that come block by block, and a session of actions; each device keeps its heads of the past."""
    check_videos(parallel, tmp_path, ["causal-rolling", "world"])
