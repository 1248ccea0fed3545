"""Every family whose text is read by cross-attention, with its tokens shared out in every way."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from distributed.opened import open_among
from distributed.ranks import run_ranks
from distributed.sequence_cases import CONTRACTS, EXACT, MERGED, Case, check_cases, forward, make_cases
from distributed.test_sequence import ODD, SPARSE
from kinetoscope.core.errors import CompositionError
from kinetoscope.loading import resolve_model
from kinetoscope.parallel import Groups, ParallelConfig
from kinetoscope.parallel.sequence import SequenceShard
from kinetoscope.runtime.parallel import check_layout
from models.tiny_cosmos import make_tiny_cosmos, without_torchvision
from models.tiny_ltx import make_tiny_ltx
from models.tiny_skyreels import make_tiny_skyreels
from tiny import make_tiny_wan

LAYOUTS = ("ulysses=2", "ring=2", "ring=2,ulysses=2", "ulysses=4", "ring=4")
CAUSAL = {"skyreels-causal": [(2, 6, 6, 2), (1, 4, 4, 4)]}
"""Shapes for models whose blocks hold two frames."""

pytestmark = pytest.mark.distributed


def tolerance(parallel: str) -> float:
    """Heads are computed as one process computes them; but products of fewer than four rows, as four processes have
    some, are of another kernel."""
    return EXACT if parallel == "ulysses=2" else MERGED


@pytest.mark.parametrize("parallel", LAYOUTS)
def test_forwards(parallel: str) -> None:
    cases = [c for name in CONTRACTS for c in make_cases([name], CAUSAL.get(name, ODD))]
    check_cases(parallel, cases, tolerance(parallel))


@pytest.mark.parametrize("parallel", LAYOUTS)
def test_forwards_of_few_tokens(parallel: str) -> None:
    """Fewer than there are processes, too."""
    cases = [c for name in CONTRACTS if name not in CAUSAL for c in make_cases([name], [(1, 1, 2, 2), (1, 1, 2, 6)])]
    check_cases(parallel, cases, MERGED)


@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize("parallel", ["ulysses=2", "ulysses=4"])
def test_sparse_kinds(parallel: str, kind: str) -> None:
    cases = make_cases(["wan-gated", "wan-frames", "skyreels", "cosmos", "ltx"], ODD, kind)
    check_cases(parallel, cases, tolerance(parallel), kind)


def compiled(groups: Groups, cases: list[Case]) -> list[torch.Tensor]:
    torch._dynamo.reset()
    for case in cases:
        for block in cast(Any, case.model).blocks:
            block.compile(backend="eager")
    return [forward(case, "auto", SequenceShard.of(groups)) for case in cases for _ in range(2)]


@pytest.mark.parametrize("parallel", ["ulysses=2", "ring=2"])
def test_compiled_blocks(parallel: str) -> None:
    """A graph breaks where processes talk; what is around it is compiled."""
    cases = make_cases(["wan-frames", "skyreels-causal"], [(2, 4, 6, 2)])
    ranks = run_ranks(parallel, compiled, cases, seconds=300)
    for index, got in enumerate(ranks[0]):
        np.testing.assert_allclose(got, cases[index // 2].expected.numpy(), rtol=0, atol=MERGED)
        np.testing.assert_array_equal(got, ranks[1][index])


# -- videos -----------------------------------------------------------------------------------------------------------


def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (48, 80, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def cosmos(kind: str) -> Any:
    def make(path: Path) -> None:
        with without_torchvision():
            make_tiny_cosmos(path, kind)

    return make


VIDEOS: dict[str, tuple[Any, dict[str, Any]]] = {
    "wan": (lambda p: make_tiny_wan(p), {}),
    "wan-i2v": (lambda p: make_tiny_wan(p, kind="i2v"), {"image": picture()}),
    "wan-a14b": (lambda p: make_tiny_wan(p, kind="a14b"), {"guidance_scale_2": 3.0}),
    "wan-ti2v": (lambda p: make_tiny_wan(p, kind="ti2v-i2v"), {"image": picture()}),
    "skyreels": (lambda p: make_tiny_skyreels(p, "SkyReelsV2Pipeline"), {}),
    "skyreels-forcing": (lambda p: make_tiny_skyreels(p, "SkyReelsV2DiffusionForcingPipeline"),
                         {"num_frames": 17, "ar_step": 1, "causal_block_size": 1}),
    "cosmos": (cosmos("CosmosTextToWorldPipeline"), {}),
    "cosmos-2": (cosmos("Cosmos2VideoToWorldPipeline"), {"image": picture()}),
    "ltx": (make_tiny_ltx, {"height": 32, "width": 40}),
}  # fmt: skip


def generate(groups: Groups | None, path: Path, fields: dict[str, Any], cfg: str) -> torch.Tensor:
    generator = open_among(groups, path, cfg=cfg)
    given = {
        "height": 48, "width": 80, "num_frames": 9, "num_inference_steps": 3, "seed": 3, "guidance_scale": 4.0,
        "negative_prompt": "a",
    }  # fmt: skip
    return generator.generate_video("a red circle", **given | fields).latents


def generate_all(groups: Groups | None, folder: Path, cfg: str) -> dict[str, torch.Tensor]:
    return {name: generate(groups, folder / name, fields, cfg) for name, (_, fields) in VIDEOS.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, (make, _) in VIDEOS.items():
        (folder / name).mkdir()
        make(folder / name)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What one process makes."""
    return {cfg: generate_all(None, folder, cfg) for cfg in ("batched", "sequential")}


@pytest.mark.parametrize("parallel", LAYOUTS[:3])
@pytest.mark.parametrize("cfg", ["batched", "sequential"])
def test_videos(folder: Path, alone: dict[str, Any], parallel: str, cfg: str) -> None:
    expected = alone[cfg]
    ranks = run_ranks(parallel, generate_all, folder, cfg, seconds=400)
    for name, one in expected.items():
        for rank in ranks:
            np.testing.assert_array_equal(rank[name], ranks[0][name], err_msg=name)
        apart = np.abs(ranks[0][name] - one.numpy()).max() / one.std()
        assert apart <= 1e-4, (name, apart)


@pytest.mark.parametrize("option", ["attention=vsa", "attention=self=sta"])
def test_ring_and_sparse_kinds_are_refused_before_anything_loads(tmp_path: Path, option: str) -> None:
    make_tiny_wan(tmp_path)
    name, _, value = option.partition("=")
    with pytest.raises(CompositionError, match=r"ring=2 and attention='.*' cannot be used together"):
        check_layout(ParallelConfig.of("ring=2"), resolve_model(str(tmp_path)), {name: value})
    check_layout(ParallelConfig.of("ulysses=2"), resolve_model(str(tmp_path)), {name: value})
