"""The cost model against runs of two processes: what they send in a step, and the weights that they hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed.opened import open_among
from distributed.ranks import run_ranks
from distributed.sharded import held_bytes
from kinetoscope.core.types import SamplingParams
from kinetoscope.parallel import Groups, ParallelConfig
from kinetoscope.parallel.comm import SENT
from kinetoscope.runtime.layouts import bytes_a_step, weight_bytes
from kinetoscope.runtime.paper import paper_pipeline
from kinetoscope.runtime.workload import Workload, workload
from runtime.families import FAMILIES, SHORT

SIZE: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 9}
LARGER = SIZE | {"height": 64, "width": 96}
"""Of which modulation is as little of the whole as in videos of any use."""
LAYOUTS = ("ulysses=2", "ring=2", "tp=2", "cfg=2", "cfg=2,fsdp=true")
FOUR = ("ring=2,ulysses=2", "tp=2,ulysses=2", "cfg=2,tp=2,fsdp=true")
REST = ("skyreels", "ltx", "cosmos", "longcat", "hunyuan")
GUIDED = {"hunyuan": {"true_cfg_scale": 3.0, "negative_prompt": "a"}}
"""What makes two branches where the model has one by default."""
TEXT = {"hunyuan": 66}
"""Tokens of the prompt in its template, for models that read it at its true length; the plan takes the longest."""


def measured(groups: Groups, path: Path, name: str, size: dict[str, Any]) -> tuple[dict[str, int], int]:
    """Bytes sent in one step (what three steps send more than two, once the text is known), and of the weights held."""
    generator = open_among(groups, path)
    totals: list[dict[str, int]] = []
    for steps in (2, 2, 3):
        SENT.clear()
        request = FAMILIES[name].request(**size, **GUIDED.get(name, {}))
        generator.generate_video(SHORT, **request | {"num_inference_steps": steps})
        totals.append(dict(SENT))
    modules = generator.pipeline.loaded_modules().values()
    held = sum(held_bytes(m) for m in modules if isinstance(m, torch.nn.Module))
    return {k: n for k in totals[2] if (n := totals[2][k] - totals[1].get(k, 0))}, held


def planned(path: Path, name: str, size: dict[str, Any]) -> Workload:
    extra = {k: v for k, v in GUIDED.get(name, {}).items() if k in SamplingParams.__dataclass_fields__}
    more = {k: v for k, v in GUIDED.get(name, {}).items() if k not in extra}
    fields: dict[str, Any] = FAMILIES[name].fields | size | extra | ({"extra": more} if more else {})
    with paper_pipeline(str(path)) as pipeline:
        work = workload(pipeline, SamplingParams(**fields, num_inference_steps=2))
    return replace(work, text=TEXT.get(name, work.text))


def check(path: Path, name: str, layouts: tuple[str, ...], rel: float, size: dict[str, Any] = SIZE) -> None:
    path.mkdir()
    FAMILIES[name].make(path)
    work = planned(path, name, size)
    for layout in layouts:
        config = ParallelConfig.of(layout)
        expected = bytes_a_step(config, work)
        for sent, held in run_ranks(config, measured, path, name, size):
            assert sent.keys() == expected.keys(), (layout, sent, expected)
            for scheme, count in sent.items():
                assert expected[scheme] == pytest.approx(count, rel=rel), (layout, scheme, count, expected[scheme])
            assert weight_bytes(config, work) == pytest.approx(held, rel=0.1), (layout, held)


def test_two_processes(tmp_path: Path) -> None:
    """Wan: to the byte."""
    check(tmp_path / "m", "wan", LAYOUTS, 0)


@pytest.mark.distributed
def test_four_processes(tmp_path: Path) -> None:
    check(tmp_path / "m", "wan", FOUR, 0)


@pytest.mark.distributed
@pytest.mark.parametrize("name", REST)
def test_other_families(tmp_path: Path, name: str) -> None:
    check(tmp_path / "m", name, LAYOUTS, 0.1, LARGER)
