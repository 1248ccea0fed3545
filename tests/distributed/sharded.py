"""Tiny models of every family, and what is asked of them when their weights are shared out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kinetoscope.core.sharding import ShardPlan
from kinetoscope.loading.components import shard_plan
from kinetoscope.parallel import Groups
from kinetoscope.parallel.comm import SENT
from kinetoscope.parallel.placement import place_module
from kinetoscope.pipelines.presets import pipeline_class  # noqa: F401 - registers the families
from kinetoscope.pipelines.presets.matrix_game import TRANSFORMERS
from models import (
    test_causal_wan,
    test_cosmos,
    test_hunyuan,
    test_hunyuan15,
    test_longcat,
    test_ltx,
    test_matrix_game,
    test_skyreels,
    test_wan,
    test_wan_fun,
)

FAMILIES: dict[str, Callable[[], Any]] = {
    "wan": test_wan.TestWan,
    "wan-folded": test_wan.TestWanFolded,
    "wan-frames": test_wan.TestWanTimestepPerFrame,
    "wan-image": test_wan.TestWanTwoImages,
    "wan-control": test_wan_fun.TestReference,
    "wan-camera": test_wan_fun.TestCamera,
    "causal-wan": test_causal_wan.TestCausalWan,
    "skyreels": test_skyreels.TestFirstAndLastFrame,
    "skyreels-forcing": test_skyreels.TestForcingInCausalBlocks,
    "cosmos": test_cosmos.TestCosmos,
    "cosmos-video": test_cosmos.TestCosmosVideoToWorld,
    "cosmos-2.5": test_cosmos.TestCosmos25,
    "ltx": test_ltx.TestLTX,
    "ltx-frames": test_ltx.TestLTXTimestepPerFrame,
    "hunyuan": test_hunyuan.TestHunyuan,
    "hunyuan-replace": test_hunyuan.TestHunyuanTokenReplace,
    "hunyuan-concat": test_hunyuan.TestHunyuanConcat,
    "hunyuan15": test_hunyuan15.TestHunyuan15,
    "hunyuan15-image": test_hunyuan15.TestHunyuan15MeanFlow,
    "longcat": test_longcat.TestLongCat,
    "longcat-vc": test_longcat.TestLongCatContinuation,
    "matrix-game": test_matrix_game.TestMatrixGame,
}


CLASSES = {"MatrixGameTransformer3DModel": TRANSFORMERS[0]}
"""Classes that are published under another name."""


@dataclass
class Case:
    """A model with its weights, inputs, and what comes out on one device: in a forward, and with parts prepared."""

    name: str
    model: nn.Module
    plan: ShardPlan
    inputs: dict[str, Any]
    ahead: Callable[[nn.Module], Tensor]
    expected: Tensor

    def outputs(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Of one forward, and of one with what runs prepare."""
        with torch.no_grad():
            return model(**self.inputs), self.ahead(model)


def make_case(name: str) -> Case:
    """Of a name in `FAMILIES`."""
    family = FAMILIES[name]()
    torch.manual_seed(0)  # noqa: TID251 - what modules are initialised from
    model = family.make_model().eval().requires_grad_(False)
    inputs = family.inputs((1, *family.SHAPES[0][1:]), torch.Generator().manual_seed(11))
    plan = shard_plan(CLASSES.get(type(model).__name__, type(model).__name__))
    assert plan is not None, name

    def ahead(model: nn.Module) -> Tensor:
        timed = {k: inputs[k] for k in family.TIMED if k in inputs}
        steps: Any = model.prepare_timesteps(inputs["timestep"], **timed)  # pyright: ignore
        rows, shared = family.prepare(model, inputs)
        more = {k: inputs[k] for k in ("timestep_r",) if k in inputs}
        return model(inputs["latents"], inputs["timestep"], **rows, **shared, **(steps if not more else {}), **timed)

    with torch.no_grad():
        return Case(name, model, plan, inputs, ahead, model(**inputs))


def shared_out(groups: Groups, case: Case, styles: Mapping[str, str] | None = None) -> nn.Module:
    """A copy of the case's model as this process holds it."""
    model = copy.deepcopy(case.model)
    plan = case.plan if styles is None else ShardPlan(styles, case.plan.outside, case.plan.roots)
    place_module(model, plan, groups)
    return model


def held_bytes(model: nn.Module) -> int:
    """Of the parameters that are here."""
    held = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return sum({t.data_ptr(): t.nbytes for t in held}.values())


def errors(groups: Groups, cases: list[Case]) -> dict[str, Any]:
    """Case -> largest error of both ways, bytes held now and after the forwards, and the bytes sent."""
    found: dict[str, Any] = {}
    for case in cases:
        try:
            model = shared_out(groups, case)
            held = held_bytes(model)
            SENT.clear()
            outs = case.outputs(model)
            wrong = [(out - case.expected).abs().max().item() for out in outs]
            found[case.name] = {"error": max(wrong), "held": held, "after": held_bytes(model), "sent": dict(SENT)}
        except Exception as error:
            raise AssertionError(f"{case.name}: {error!r}") from error
    return found
