"""Tokens shared out in families whose text is among them, that remember blocks, or that keep frames."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import models.test_causal_wan as causal_wan
import models.test_hunyuan as hunyuan
import models.test_hunyuan15 as hunyuan15
import models.test_longcat as longcat
import models.test_matrix_game as matrix_game
from distributed.opened import open_among
from distributed.ranks import run_ranks
from distributed.sequence_cases import EXACT, MERGED, Case, check_cases, check_gradients, make_cases
from kinetoscope.core.errors import CompositionError
from kinetoscope.engine.hooks import Hook
from kinetoscope.loading import resolve_model
from kinetoscope.parallel import Groups, ParallelConfig
from kinetoscope.runtime.parallel import check_layout
from models.tiny_hunyuan import make_tiny_hunyuan, make_tiny_hunyuan_i2v
from models.tiny_hunyuan15 import make_tiny_hunyuan15
from pipelines.test_matrix_game import make_world
from runtime.families import LONGCAT, make_causal


class InBlocks(causal_wan.TestCausalWan):
    """Frames that see no later block."""

    def inputs(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
        first = shape[2] // 2
        blocks = [first, shape[2] - first] if first else [shape[2]]
        return super().inputs(shape, generator) | {"blocks": blocks}


class Cached(longcat.TestLongCatContinuation):
    """The given frames in a cache of every process."""

    def inputs(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
        given = super().inputs(shape, generator)
        latents, timestep = given["latents"], given["timestep"]
        with torch.no_grad():
            cache = longcat.build().cache_condition(latents[:, :, :2])
        return given | {"latents": latents[:, :, 2:], "timestep": timestep[:, 2:], "kv_cache": cache}


OWN: dict[str, Any] = {
    "hunyuan": hunyuan.TestHunyuan,
    "hunyuan-first-frame": hunyuan.TestHunyuanTokenReplace,
    "hunyuan-concat": hunyuan.TestHunyuanConcat,
    "hunyuan15": hunyuan15.TestHunyuan15,
    "hunyuan15-image": hunyuan15.TestHunyuan15Image,
    "causal": causal_wan.TestCausalWan,
    "causal-blocks": InBlocks,
    "longcat": longcat.TestLongCat,
    "longcat-frames": longcat.TestLongCatContinuation,
    "longcat-cached": Cached,
    "matrix-game": matrix_game.TestMatrixGame,
    "matrix-game-frames": matrix_game.TestMatrixGameTimestepPerFrame,
}
QUICK = ("hunyuan-first-frame", "hunyuan15", "causal-blocks", "longcat", "matrix-game")


def cases(names: Sequence[str], *, large: bool = False) -> list[Case]:
    """Models with inputs; only the `large` of their shapes, whose matrix products are not of so few rows that they are
    another kernel's."""
    made = make_cases(names, contracts=OWN)
    return [c for c in made if not large or c.expected.numel() > 400]


def test_forwards_by_heads() -> None:
    check_cases("ulysses=2", cases(QUICK, large=True), EXACT)


def test_forwards_around_a_ring() -> None:
    check_cases("ring=2", cases(QUICK), MERGED)


@pytest.mark.distributed
@pytest.mark.parametrize("parallel", ["ulysses=2", "ring=2", "ulysses=2,ring=2", "ulysses=4", "ring=4", "ring=3"])
def test_forwards(parallel: str) -> None:
    check_cases(parallel, cases(list(OWN)), MERGED)


@pytest.mark.distributed
@pytest.mark.parametrize("parallel", ["ulysses=2", "ring=2", "ulysses=2,ring=2"])
def test_gradients(parallel: str) -> None:
    """Of families whose text is among the tokens, or that see blocks, from both."""
    names = ("hunyuan-first-frame", "hunyuan15", "causal-blocks", "longcat-frames", "matrix-game", "skyreels-causal")
    for name in names:
        made = make_cases([name], contracts=OWN) if name in OWN else make_cases([name], [(1, 4, 4, 4)])
        check_gradients(parallel, made[:1])


# -- videos and streams -----------------------------------------------------------------------------------------------


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8))


def first_frame(path: Path) -> None:
    make_tiny_hunyuan_i2v(path, "token_replace")


def longcat_files(path: Path) -> None:
    shutil.copytree(LONGCAT, path, dirs_exist_ok=True)


SMALL: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 3, "seed": 3}
CONTINUED = {
    "num_frames": 13, "num_cond_frames": 5, "guidance_scale": 4.0, "negative_prompt": "a",
    "video": np.random.default_rng(1).integers(0, 255, (7, 32, 48, 3), dtype=np.uint8),
}  # fmt: skip
GUIDED = {"guidance_scale": 3.0, "negative_prompt": "a"}
WALK = [{"keys": ["w"], "repeat": 9}, {"keys": ["w", "d"], "mouse": "right", "repeat": 24}]
PLAYED = {"image": picture(), "actions": WALK}
VIDEOS: dict[str, tuple[Callable[[Path], Any], dict[str, Any]]] = {
    "hunyuan": (make_tiny_hunyuan, {"true_cfg_scale": 3.0, "negative_prompt": "a"}),
    "hunyuan-first-frame": (first_frame, {"image": picture()}),
    "hunyuan15": (make_tiny_hunyuan15, GUIDED),
    "longcat": (longcat_files, GUIDED),
    "longcat-continued": (longcat_files, CONTINUED),
    "longcat-cached": (longcat_files, CONTINUED | {"use_kv_cache": True}),
    "causal": (make_causal, GUIDED | {"num_inference_steps": None}),
    "causal-rolling": (
        make_causal,
        {"num_inference_steps": None, "num_frames": 33, "local_attn_size": 4, "sink_size": 1},
    ),
    "world": (lambda path: make_world(path, "base"), PLAYED | {"num_inference_steps": None, "num_frames": 33}),
}
STREAMS = ("causal", "causal-rolling", "world")


class Kept(Hook):
    """How many numbers the K/V cache of self-attention holds."""

    name = "kept"
    numbers = 0

    def on_block_start(self, state: Any, context: Any) -> None:
        table = state.tables.get("rollout")
        cache = (
            state.tables["play"].conditioning["memory"].tokens
            if table is None
            else table.experts[0].conditioning["cache"]
        )
        self.numbers = sum(t.numel() for t in (*cache.keys, *cache.values))


def generate(groups: Groups | None, folder: Path, name: str, cache: str | None = None) -> dict[str, Any]:
    """The latents of a video; of families that make streams its frames and a stream's, and what is kept of the past."""
    fields, kept = SMALL | VIDEOS[name][1], Kept()
    plan = "auto" if groups is not None and groups.cfg.size > 1 else "sequential"
    streams = name in STREAMS and cache is None
    generator = open_among(groups, folder / name, cfg=plan, cache=cache, hooks=[kept] if streams else [])
    whole = generator.generate_video("a cat", **fields)
    if not streams:
        return {"latents": whole.latents, "left_out": whole.logging_info.get("step_cache", {}).get("skipped", 0)}
    prompt = None if name == "world" else "a cat"
    given = {k: v for k, v in fields.items() if k not in ("num_frames", "num_inference_steps")}
    chunks = list(generator.stream(prompt, blocks=3, **given))
    made = np.concatenate(chunks)
    return {"latents": whole.latents, "frames": whole.frames[: len(made)], "stream": made, "numbers": kept.numbers}


def generate_all(groups: Groups | None, folder: Path, names: Sequence[str], cache: str | None = None) -> dict[str, Any]:
    return {name: generate(groups, folder, name, cache) for name in names}


def check_videos(parallel: str, folder: Path, names: Sequence[str], cache: str | None = None) -> None:
    """All processes have the same bits, near to what one makes; a stream is the video, and keeps its heads alone."""
    for name in names:
        if not (folder / name).exists():
            (folder / name).mkdir()
            VIDEOS[name][0](folder / name)
    expected = generate_all(None, folder, names, cache)
    ranks = run_ranks(parallel, generate_all, folder, names, cache, seconds=400)
    for name, one in expected.items():
        for rank in ranks:
            np.testing.assert_array_equal(rank[name]["latents"], ranks[0][name]["latents"], err_msg=name)
        apart = np.abs(ranks[0][name]["latents"] - one["latents"].numpy()).max() / one["latents"].std()
        assert apart <= 1e-4, (name, apart)
        if cache is not None:
            assert one["left_out"] > 0 and all(rank[name]["left_out"] == one["left_out"] for rank in ranks), name
        if "stream" in one:
            got, layout = ranks[0][name], ParallelConfig.of(parallel)
            share = layout.ulysses * layout.tp
            np.testing.assert_array_equal(got["stream"], got["frames"], err_msg=name)
            assert np.abs(got["stream"].astype(int) - one["stream"]).max() <= 1, name
            assert got["numbers"] * share == one["numbers"], name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def test_streams_whose_heads_are_shared_out(folder: Path) -> None:
    check_videos("ulysses=2", folder, ["causal-rolling"])


@pytest.mark.distributed
@pytest.mark.parametrize("parallel", ["ulysses=2", "ring=2", "ring=2,ulysses=2"])
def test_videos(folder: Path, parallel: str) -> None:
    whole = "ring" in parallel
    check_videos(parallel, folder, [name for name in VIDEOS if not (whole and name in STREAMS)])


@pytest.mark.distributed
def test_branches_and_heads_shared_out(folder: Path) -> None:
    """Each device keeps the past of its branch and of its heads."""
    check_videos("cfg=2,ulysses=2", folder, ["causal", "hunyuan", "longcat-cached"])


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("cache", "names"),
    [
        ("fbcache:threshold=0.9", ["hunyuan", "longcat"]),
        ("dbcache:threshold=0.9,first=1,last=1,warmup=1", ["hunyuan"]),  # LongCat's two blocks leave none to skip
        ("taylorseer:interval=2,warmup=1", ["hunyuan", "longcat", "hunyuan15"]),
    ],
)
@pytest.mark.parametrize("parallel", ["ulysses=2", "ring=2"])
def test_step_caches_see_all_tokens(folder: Path, parallel: str, cache: str, names: list[str]) -> None:
    """Between blocks of two streams and of one, too; every process leaves out what one would."""
    check_videos(parallel, folder, names, cache)


@pytest.mark.parametrize("name", ["causal", "world"])
def test_a_ring_has_no_whole_frames_to_keep(folder: Path, name: str) -> None:
    if not (folder / name).exists():
        (folder / name).mkdir()
        VIDEOS[name][0](folder / name)
    with pytest.raises(CompositionError, match=r"parallel ring=2 and \S+ cannot be used together: its K/V cache"):
        check_layout(ParallelConfig.of("ring=2"), resolve_model(str(folder / name)), {})
