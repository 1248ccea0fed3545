"""Sparse kinds against masks over all pairs of tokens, and against dense attention where nothing is left out."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from kinetoscope.attention import SPARSE, Role, capabilities, make_sparse
from kinetoscope.attention.backends import math_attention
from kinetoscope.attention.default import default_attention
from kinetoscope.attention.sparse import reference
from kinetoscope.attention.sparse.base import Trained
from kinetoscope.attention.sparse.tiles import tile_layout
from kinetoscope.attention.sparse.vmoba import most_similar
from kinetoscope.core.context import ForwardContext, StepInfo, forward_context

CPU = capabilities("cpu", torch.float32)
WAN = (Role("self", grid=True), Role("cross", key_bias=True))
GRIDS = [(4, 4, 4), (3, 5, 6), (1, 1, 7)]
SPECS = [
    "sta:window=1,1,3,tile=2,2,2",
    "sta:window=2,1,3,tile=3,2,4",
    "vsa:sparsity=0.6,tile=2,2,2",
    "vsa:sparsity=0.9,tile=2,4,4",
    "vmoba:threshold=0.2,time=2,space=2,3,both=2,2,2",
    "vmoba:threshold=0.3,scope=query,time=2,space=2,3,both=2,2,2",
    "vmoba:sparsity=0.5,time=2,space=2,3,both=2,2,2",
    "sla:sparsity=0.7,query_block=16,key_block=8",
    "sla:sparsity=0.7,query_block=5,key_block=7",
]


def qkv(grid: tuple[int, int, int], others: int = 0, seed: int = 0, rows: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, math.prod(grid) + others, 3, 8)
    return [torch.randn(shape, generator=generator) for _ in range(3)]


def hide_last(rows: int, keys: int) -> Tensor:
    """Row 0 weighs its last key three times, row 1 hides two and one of the grid's."""
    made = torch.zeros(rows, keys)
    made[0, -1] = math.log(3)
    made[1, -2:] = -math.inf
    made[1, 0] = -math.inf
    return made


def run(spec: str, kernel: str, tensors: list[Tensor], grid: Any, layer: int = 0, **more: Any) -> Tensor:
    made = make_sparse(f"{spec},kernel={kernel}" if ":" in spec else f"{spec}:kernel={kernel}")
    with forward_context(ForwardContext(layer=layer)):
        return made.over_grid(*tensors, grid=grid, **more)


@pytest.mark.parametrize("spec", [s for s in SPECS if s.startswith("vmoba")])
@pytest.mark.parametrize("others", [0, 3])
def test_many_tokens_equal_the_mask(spec: str, others: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """VMoBA over many tokens goes head by head and chunk by chunk; here it does so over few."""
    monkeypatch.setattr("kinetoscope.attention.sparse.vmoba.MASKED_BELOW", 0)
    grid = (3, 5, 4)
    leaves = [x.requires_grad_() for x in qkv(grid, others)]
    key_bias = hide_last(2, leaves[0].shape[1]) if others else None
    for layer in range(3):
        made = [run(spec, kernel, leaves, grid, layer, key_bias=key_bias) for kernel in ("reference", "blocks")]
        torch.testing.assert_close(*made, rtol=0, atol=1e-5)
        found = [torch.autograd.grad(out.square().sum(), leaves) for out in made]
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("others", [0, 3])
def test_equals_its_mask(spec: str, grid: tuple[int, int, int], others: int) -> None:
    tensors = qkv(grid, others)
    key_bias = hide_last(2, tensors[0].shape[1]) if others else None
    for layer in range(3 if spec.startswith("vmoba") else 1):
        expected = run(spec, "reference", tensors, grid, layer, key_bias=key_bias)
        got = run(spec, "blocks", tensors, grid, layer, key_bias=key_bias)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        if others:  # tokens outside the grid attend to all
            dense = math_attention(*tensors, key_bias=key_bias)[:, -others:]
            torch.testing.assert_close(got[:, -others:], dense, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("spec", [s for s in SPECS if not s.startswith("vmoba")])
@pytest.mark.parametrize("grid", GRIDS[:2])
def test_flex_masks_equal_the_mask(spec: str, grid: tuple[int, int, int]) -> None:
    """FlexAttention without a compiler reads the mask's function alone; its lists of blocks are held to it below."""
    tensors = qkv(grid)
    expected, got = run(spec, "reference", tensors, grid), run(spec, "flex", tensors, grid)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_flex_lists_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks listed for a query tile are those that are selected for it, each once."""
    from kinetoscope.attention import flex

    seen: list[Any] = []
    monkeypatch.setattr(flex, "_call", lambda q, k, v, block_mask, **options: seen.append(block_mask) or q)
    spec, grid = "vsa:sparsity=0.6,tile=2,2,2", (3, 5, 6)
    tensors = qkv(grid)
    run(spec, "flex", tensors, grid)
    layout = tile_layout(grid, (2, 2, 2), torch.device("cpu"))
    mask = make_sparse(spec).mask(attention_context_of(spec, grid), *tensors[:2])
    listed = seen[0].to_dense().bool()  # [R, H, tiles, tiles]
    for query, key in ((0, 1), (5, 3), (17, 17)):
        pair = mask[:, :, layout.gather[query, 0], layout.gather[key, 0]]
        assert torch.equal(listed[:, :, query, key], pair)
    assert listed.sum(-1).unique().tolist() == [8]


def attention_context_of(spec: str, grid: Any) -> Any:
    from kinetoscope.attention.sparse.context import attention_context

    made = make_sparse(spec)
    return attention_context(grid, made.tile(grid, 0), math.prod(grid), made.schedule, torch.device("cpu"))


@pytest.mark.parametrize("spec", SPECS[::2])
def test_gradients(spec: str) -> None:
    grid = (3, 5, 4)
    leaves = [x.requires_grad_() for x in qkv(grid, 2, rows=1)]
    found = [
        torch.autograd.grad(run(spec, kernel, leaves, grid).square().sum(), leaves)
        for kernel in ("reference", "blocks")
    ]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "spec",
    [
        "sta:window=9,9,9,tile=2,2,2",
        "vsa:sparsity=0,tile=2,2,2",
        "vmoba:sparsity=0,time=2",
        "vmoba:threshold=1",
        "sla:sparsity=0,key_block=4",
    ],
)
@pytest.mark.parametrize("kernel", ["blocks", "reference"])
def test_at_full_density_it_is_dense(spec: str, kernel: str) -> None:
    grid = (3, 5, 6)
    tensors = qkv(grid, 2)
    key_bias = hide_last(2, tensors[0].shape[1])
    expected = math_attention(*tensors, key_bias=key_bias)
    torch.testing.assert_close(run(spec, kernel, tensors, grid, key_bias=key_bias), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", SPARSE)
def test_dense_steps_and_layers_are_dense_bit_for_bit(kind: str) -> None:
    made = make_sparse(f"{kind}:dense_steps=2,dense_layers=1")
    grid = (7, 9, 9)
    tensors = qkv(grid, 1, rows=1)
    dense = default_attention(*tensors)

    def same(step: int, layer: int) -> bool:
        with forward_context(ForwardContext(step=StepInfo(step, 5, 0.0), layer=layer)):
            return torch.equal(made.over_grid(*tensors, grid=grid), dense)

    assert same(0, 3) and same(1, 3) and same(4, 0)
    assert not same(2, 3)
    with forward_context(ForwardContext(layer=3)):  # no step: a pass that fills a cache, or training
        assert not torch.equal(made.over_grid(*tensors, grid=grid), dense)
    assert torch.equal(made(*tensors), dense)


def test_schedule() -> None:
    def shares(spec: str, count: int = 8, layer: int = 0) -> list[float]:
        made = make_sparse(spec).schedule
        return [made.share(StepInfo(i, count, 0.0), layer) for i in range(count)]

    assert shares("vsa") == [1.0] * 8
    assert shares("vsa:dense_steps=0.25") == [0, 0, *[1.0] * 6]
    assert shares("vsa:dense_steps=1,ramp=3", 6) == [0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert shares("sta:dense_layers=2", layer=1) == [0.0] * 8
    assert shares("sta:dense_layers=2", layer=2) == [1.0] * 8


def test_density_follows_the_schedule() -> None:
    """Tiles that are seen at sparsity 0.8 of 10 tiles, ramped over three steps."""
    made = make_sparse("vsa:sparsity=0.8,tile=1,1,1,ramp=3")
    seen: list[int] = []
    for step in range(5):
        with forward_context(ForwardContext(step=StepInfo(step, 5, 0.0))):
            context = attention_context_for(made, (1, 1, 10))
        seen.append(int(made.mask(context, *qkv((1, 1, 10))[:2]).sum(-1).unique()))
    assert seen == [8, 6, 4, 2, 2]


def attention_context_for(made: Any, grid: Any) -> Any:
    from kinetoscope.attention.sparse.context import attention_context

    return attention_context(grid, made.tile(grid, 0), math.prod(grid), made.schedule, torch.device("cpu"))


def test_window_by_hand() -> None:
    """Seven tiles in a row of one token, window three: at both ends it moves inside."""
    mask = reference.sta_mask((1, 1, 7), (1, 1, 1), (3, 3, 3))[0, 0].int().tolist()
    assert mask[0] == [1, 1, 1, 0, 0, 0, 0]
    assert mask[1] == [1, 1, 1, 0, 0, 0, 0]
    assert mask[3] == [0, 0, 1, 1, 1, 0, 0]
    assert mask[6] == [0, 0, 0, 0, 1, 1, 1]


def test_wrong_masks_are_seen() -> None:
    """The comparison with the mask fails for a neighbouring window, tile, number of tiles, and a dropped key bias."""
    grid = (4, 4, 8)
    tensors = qkv(grid, 2)
    key_bias = hide_last(2, tensors[0].shape[1])

    def apart(spec: str, other: str, bias: Tensor | None = key_bias) -> bool:
        expected = run(spec, "reference", tensors, grid, key_bias=key_bias)
        return not torch.allclose(run(other, "blocks", tensors, grid, key_bias=bias), expected, rtol=0, atol=1e-3)

    assert apart("sta:window=1,1,3,tile=2,2,2", "sta:window=1,1,2,tile=2,2,2")
    assert apart("sta:window=1,1,3,tile=2,2,2", "sta:window=1,3,1,tile=2,2,1")
    assert apart("vsa:sparsity=0.6,tile=2,2,2", "vsa:sparsity=0.7,tile=2,2,2")
    assert apart("vmoba:threshold=0.2,time=1", "vmoba:threshold=0.3,time=1")
    assert apart("sla:sparsity=0.7,query_block=16,key_block=8", "sla:sparsity=0.7,query_block=16,key_block=16")
    for spec in SPECS:
        assert apart(spec, spec, None)


def test_tiles_of_all_sizes() -> None:
    """Every token has one slot, sizes are those of the boxes, and padding slots are hidden."""
    layout = tile_layout((3, 5, 6), (2, 4, 4), torch.device("cpu"))
    assert layout.counts == (2, 2, 2)
    assert layout.sizes.tolist() == [32, 16, 8, 4, 16, 8, 4, 2]
    assert layout.bias is not None and (layout.bias == 0).sum(1).tolist() == layout.sizes.tolist()
    x = torch.arange(90.0).view(1, 90, 1, 1).expand(2, 90, 3, 4)
    assert torch.equal(layout.join(layout.split(x)), x)
    assert torch.equal(layout.mean(layout.split(x)), reference.means(x, reference.members((3, 5, 6), (2, 4, 4))))


@pytest.mark.parametrize("kernel", ["blocks", "reference"])
def test_gate_of_vsa(kernel: str) -> None:
    """O = O_s + gate O_c, means over the tokens that a tile has; no gate and a gate of zero are the exact part."""
    spec, grid = "vsa:sparsity=0.6,tile=2,2,4", (3, 5, 6)
    tensors = qkv(grid)
    gate = qkv(grid, seed=1)[0]
    plain = run(spec, kernel, tensors, grid)
    coarse = reference.vsa_coarse(*tensors, grid, (2, 2, 4))
    torch.testing.assert_close(run(spec, kernel, tensors, grid, trained=Trained(gate)), plain + gate * coarse)
    assert torch.equal(run(spec, kernel, tensors, grid, trained=Trained(gate * 0)), plain)
    with forward_context(ForwardContext(step=StepInfo(0, 4, 0.0))):  # also where the exact part is dense
        made = make_sparse(spec + ",dense_steps=1")
        got = made.over_grid(*tensors, grid=grid, trained=Trained(gate))
    torch.testing.assert_close(got, math_attention(*tensors) + gate * coarse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kernel", ["blocks", "reference"])
def test_projection_of_sla(kernel: str) -> None:
    spec, grid = "sla:sparsity=0.5,query_block=16,key_block=8", (3, 5, 4)
    tensors = qkv(grid)
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(2))
    got = run(spec, kernel, tensors, grid, trained=Trained(project=lambda x: x @ weight))
    expected = run(spec, kernel, tensors, grid) + reference.sla_linear(*tensors) @ weight
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_rows_do_not_share_a_choice(spec: str) -> None:
    grid = (3, 5, 6)
    tensors = qkv(grid)
    together = run(spec, "blocks", tensors, grid)
    alone = run(spec, "blocks", [x[1:] for x in tensors], grid)
    torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_most_similar_pairs(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores, own = torch.randn(6, 40, generator=generator), torch.rand(6, 40, generator=generator) < 0.1
    for threshold in (0.05, 0.4, 1.0):
        got = most_similar(scores, own, threshold)
        for row in range(6):
            expected = reference._until(scores[row : row + 1], own[row : row + 1], threshold)
            assert torch.equal(got[row : row + 1] | own[row : row + 1], expected | own[row : row + 1])


def test_half_precision() -> None:
    """Within rounding of bfloat16: 1e-3 on average over outputs of size 0.3."""
    grid = (2, 3, 4)
    low = [x.bfloat16() for x in qkv(grid, rows=1)]
    for spec in (
        "sta:window=1,1,3,tile=1,2,2",
        "vsa:sparsity=0.5,tile=1,2,2",
        "sla:sparsity=0.5,query_block=8,key_block=4",
    ):
        expected, got = run(spec, "reference", [x.float() for x in low], grid), run(spec, "blocks", low, grid)
        assert got.dtype == torch.bfloat16
        assert (got.float() - expected).abs().mean() < 1e-3


# -- Triton -----------------------------------------------------------------------------------------------------------

TRITON = """
import torch
from kinetoscope.attention import make_sparse
generator = torch.Generator().manual_seed(0)
for spec, grid, others in {cases}:
    tensors = [torch.randn(2, grid[0] * grid[1] * grid[2] + others, 2, {channels}, generator=generator).to("{device}")
               for _ in range(3)]
    bias = torch.zeros(2, tensors[0].shape[1], device="{device}")
    bias[1, -2:] = -torch.inf
    expected = make_sparse(spec + ",kernel=reference").over_grid(*tensors, grid=grid, key_bias=bias)
    got = make_sparse(spec + ",kernel=triton").over_grid(*tensors, grid=grid, key_bias=bias)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
"""
CASES = [
    ("sta:window=1,1,3,tile=2,2,2", (3, 5, 6), 3),
    ("sta:window=1,1,1,tile=6,8,8", (6, 8, 8), 0),
    ("vsa:sparsity=0.6,tile=2,4,4", (3, 5, 6), 0),
]


def run_triton(device: str, channels: int, **environment: str) -> None:
    script = TRITON.format(cases=CASES, device=device, channels=channels)
    own = {**os.environ, **environment}  # noqa: TID251 - a test's child process
    subprocess.run([sys.executable, "-c", script], check=True, env=own)


@pytest.mark.slow
def test_triton_in_its_interpreter_equals_the_mask() -> None:
    pytest.importorskip("triton")
    run_triton("cpu", 24, TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_triton_equals_the_mask() -> None:
    run_triton("cuda", 64)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ["sta:window=1,3,1,tile=2,8,8", "vsa:sparsity=0.6,tile=2,8,8", "sla:query_block=128"])
def test_flex_on_a_gpu_equals_the_mask(spec: str) -> None:
    grid = (5, 20, 20)
    tensors = [x.cuda() for x in qkv(grid)]
    expected, got = run(spec, "reference", tensors, grid), run(spec, "flex", tensors, grid)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)
