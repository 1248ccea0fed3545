"""Transformers of families on whose tokens several processes work, and what one process makes of the same inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import models.test_cosmos as cosmos
import models.test_ltx as ltx
import models.test_skyreels as skyreels
import models.test_wan as wan
import models.test_wan_fun as wan_fun
from distributed.ranks import run_ranks
from kinetoscope.attention import capabilities, resolve_attention
from kinetoscope.attention.roles import Role
from kinetoscope.core.context import ForwardContext, forward_context
from kinetoscope.models.wan.config import WanConfig
from kinetoscope.models.wan.transformer import WanTransformer3DModel
from kinetoscope.parallel import Groups
from kinetoscope.parallel.sequence import SequenceShard
from tiny import perturb

EXACT = 0.0  # heads are computed as one process computes them
MERGED = 1e-5


class ThreeHeads(wan.TestWan):
    """Heads that no even number of processes can share."""

    TINY = wan.TINY | {"num_attention_heads": 3, "ffn_dim": 48}


class Gated(wan.TestWan):
    """Trained with video sparse attention."""

    def make_model(self) -> nn.Module:
        model = WanTransformer3DModel(WanConfig.from_dict(self.TINY | {"compress_gates": True}))
        model.init_weights(torch.Generator().manual_seed(3))
        perturb(model, seed=4, scale=0.1)
        return model


CONTRACTS: dict[str, Any] = {
    "wan": wan.TestWan,
    "wan-folded": wan.TestWanFolded,
    "wan-frames": wan.TestWanTimestepPerFrame,
    "wan-image": wan.TestWanImage,
    "wan-two-images": wan.TestWanTwoImages,
    "wan-three-heads": ThreeHeads,
    "wan-gated": Gated,
    "fun-control": wan_fun.TestControl,
    "fun-reference": wan_fun.TestReference,
    "fun-camera": wan_fun.TestCamera,
    "skyreels": skyreels.TestTextToVideo,
    "skyreels-image": skyreels.TestImageToVideo,
    "skyreels-frames": skyreels.TestForcing,
    "skyreels-causal": skyreels.TestForcingInCausalBlocks,
    "cosmos": cosmos.TestCosmos,
    "cosmos-folded": cosmos.TestCosmosFolded,
    "cosmos-image": cosmos.TestCosmosImage,
    "cosmos-video": cosmos.TestCosmosVideoToWorld,
    "cosmos-2.5": cosmos.TestCosmos25,
    "ltx": ltx.TestLTX,
    "ltx-frames": ltx.TestLTXTimestepPerFrame,
}
ROLES = (Role("self", grid=True), Role("cross", key_bias=True), Role("joint", key_bias=True, grid=True))


@dataclass
class Case:
    """A model, inputs, and its output."""

    name: str
    model: nn.Module
    inputs: dict[str, Any]
    expected: Tensor


def forward(case: Case, attention: str = "auto", shard: Any = None) -> Tensor:
    """The output, with the attention of all roles that have a grid of a kind."""
    table = resolve_attention(attention, capabilities("cpu", torch.float32), ROLES)
    with torch.no_grad(), forward_context(ForwardContext(table, shard=shard)):
        return case.model(**case.inputs)


def make_cases(
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...]] | None = None,
    attention: str = "auto",
    contracts: Mapping[str, Any] = CONTRACTS,
) -> list[Case]:
    """Each model with each of `shapes` (rows and latent T, H, W) that its patches allow; None: with its own shapes."""
    made: list[Case] = []
    for name in names:
        contract = contracts[name]()
        model, generator = contract.make_model().eval(), torch.Generator().manual_seed(11)
        own = contract.SHAPES[0][1]
        for shape in contract.SHAPES if shapes is None else [(s[0], own, *s[1:]) for s in shapes]:
            case = Case(f"{name} {shape}", model, contract.inputs(shape, generator), torch.empty(0))
            case.expected = forward(case, attention)
            made.append(case)
    return made


def forward_all(groups: Groups, cases: Sequence[Case], attention: str) -> list[Tensor]:
    return [forward(case, attention, SequenceShard.of(groups)) for case in cases]


def check_cases(parallel: str, cases: Sequence[Case], tolerance: float, attention: str = "auto") -> None:
    """All processes have what one would make, the same bits in all of them."""
    ranks = run_ranks(parallel, forward_all, cases, attention)
    for index, case in enumerate(cases):
        for rank in ranks:
            np.testing.assert_array_equal(rank[index], ranks[0][index], err_msg=case.name)
        np.testing.assert_allclose(ranks[0][index], case.expected.numpy(), rtol=0, atol=tolerance, err_msg=case.name)
        assert case.expected.std() > 0.05, "the comparison needs outputs of some size"


def gradients(model: nn.Module, inputs: Mapping[str, Any], shard: Any = None) -> dict[str, Tensor]:
    """Of every weight, of a loss that weighs all numbers of the output differently."""
    model.requires_grad_(True)
    with forward_context(ForwardContext(shard=shard)):
        out = model(**inputs)
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape).cos()).sum().backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    model.requires_grad_(False)
    return found


def gradients_all(groups: Groups, cases: Sequence[Case]) -> list[dict[str, Tensor]]:
    return [gradients(case.model, case.inputs, SequenceShard.of(groups)) for case in cases]


def check_gradients(parallel: str, cases: Sequence[Case]) -> None:
    """The mean over the processes, which all have the same loss, is what one would find: to 1e-5 of the largest."""
    ranks = run_ranks(parallel, gradients_all, cases)
    for index, case in enumerate(cases):
        expected = gradients(case.model, case.inputs)
        most = max(float(g.abs().max()) for g in expected.values())
        for name, one in expected.items():
            mean = sum(rank[index][name] for rank in ranks) / len(ranks)
            np.testing.assert_allclose(mean, one.numpy(), rtol=0, atol=1e-5 * most, err_msg=f"{case.name} {name}")
        assert sum(bool(g.any()) for g in expected.values()) > len(expected) / 2, case.name
