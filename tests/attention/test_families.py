"""Sparse attention through the transformers of every family: their layers tell the grid their tokens really have."""

from __future__ import annotations

import importlib
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kinetoscope import VideoGenerator
from kinetoscope.attention import AttentionTable, Role, capabilities, make_sparse, resolve_attention
from kinetoscope.attention.default import default_attention
from kinetoscope.attention.sparse.reference import vsa_coarse
from kinetoscope.attention.table import AttentionChoice
from kinetoscope.core.context import ForwardContext, current_context, forward_context
from kinetoscope.core.errors import CompositionError
from kinetoscope.models.wan.config import WanConfig
from kinetoscope.models.wan.transformer import WanTransformer3DModel
from pipelines.test_fast_wan import add_gates, make_directory
from tiny import make_tiny_wan, perturb

CPU = capabilities("cpu", torch.float32)
FAMILIES = {  # contract -> the role that has a grid, tokens of a latent along time, height, width, axes that stay apart
    "wan.TestWan": ("self", (1, 2, 2), 3),
    "wan.TestWanImage": ("self", (1, 2, 2), 3),
    "wan.TestWanTimestepPerFrame": ("self", (1, 2, 2), 3),
    "cosmos.TestCosmos": ("self", (1, 2, 2), 3),
    "ltx.TestLTX": ("self", (1, 1, 1), 3),
    "skyreels.TestTextToVideo": ("self", (1, 2, 2), 3),
    "longcat.TestLongCat": ("self", (1, 2, 2), 3),
    "hunyuan.TestHunyuan": ("joint", (1, 2, 2), 0),  # the text sees all of the video, and the video the text
    "hunyuan15.TestHunyuan15": ("joint", (1, 1, 1), 0),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[nn.Module, dict[str, Any], str, tuple[int, int, int], int]:
    """A tiny transformer, inputs, and what the table above says."""
    module, name = request.param.split(".")
    contract = getattr(importlib.import_module(f"models.test_{module}"), name)()
    role, patch, apart = FAMILIES[request.param]
    rows, channels, *_ = contract.SHAPES[0]
    shape = (min(rows, 2), channels, 3, 3 * patch[1], 4 * patch[2])
    return contract.make_model(), contract.inputs(shape, torch.Generator().manual_seed(1)), role, patch, apart


@torch.no_grad()
def forward(model: nn.Module, inputs: Mapping[str, Any], role: str, spec: str) -> Tensor:
    table = resolve_attention({role: spec}, CPU, (Role(role, grid=True, key_bias=True),))
    with forward_context(ForwardContext(table)):
        return model(**inputs)


def test_it_is_dense_at_full_density_and_its_mask_below(family: Any) -> None:
    model, inputs, role, _, _ = family
    dense = forward(model, inputs, role, "auto")
    full = forward(model, inputs, role, "vsa:sparsity=0,tile=2,2,2")
    torch.testing.assert_close(full, dense, rtol=0, atol=1e-5)
    for spec in ("vsa:sparsity=0.6,tile=2,2,2", "sta:window=1,1,1,tile=2,2,2"):
        sparse, expected = (forward(model, inputs, role, f"{spec},kernel={k}") for k in ("blocks", "reference"))
        torch.testing.assert_close(sparse, expected, rtol=0, atol=1e-5)
        assert (sparse - dense).abs().max() > 1e-3


def test_the_grid_is_that_of_the_tokens(family: Any) -> None:
    """Windows of one slice of an axis: what happens in the last slice is not seen in the first, in no other axis."""
    model, inputs, role, patch, apart = family
    latents = inputs["latents"]
    grid = tuple(n // p for n, p in zip(latents.shape[2:], patch, strict=True))
    for axis in range(apart):
        tile = [*grid]
        tile[axis] = 1
        spec = f"sta:window=1,1,1,tile={','.join(map(str, tile))}"
        moved = latents.clone()
        moved.narrow(2 + axis, latents.shape[2 + axis] - patch[axis], patch[axis]).add_(1.0)
        before, after = (forward(model, inputs | {"latents": x}, role, spec) for x in (latents, moved))
        first = [x.narrow(2 + axis, 0, patch[axis]) for x in (before, after)]
        torch.testing.assert_close(*first, rtol=0, atol=1e-6)
        other = (axis + 1) % 3
        seen = [x.narrow(2 + other, 0, patch[other]) for x in (before, after)]
        assert (seen[0] - seen[1]).abs().max() > 1e-3


def test_every_grid_covers_all_tokens_of_the_video(family: Any) -> None:
    """Tokens after the grid are the text's: as many as are not in the latents."""
    model, inputs, role, patch, _ = family
    seen: list[tuple[int, Any]] = []
    sparse = make_sparse("vsa")

    class Spy(type(sparse)):
        def over_grid(self, q: Tensor, k: Tensor, v: Tensor, *, grid: Any, **more: Any) -> Tensor:
            seen.append((q.shape[1], grid))
            return default_attention(q, k, v, key_bias=more["key_bias"])

    spy = object.__new__(Spy)
    spy.__dict__.update(sparse.__dict__)
    table = AttentionTable({role: AttentionChoice("spy", "", spy)})
    with torch.no_grad(), forward_context(ForwardContext(table)):
        model(**inputs)
    grid = tuple(n // p for n, p in zip(inputs["latents"].shape[2:], patch, strict=True))
    assert seen and all(g == grid for _, g in seen)
    assert all((tokens > math.prod(grid)) == (role == "joint") for tokens, _ in seen)


def test_blocks_still_compile() -> None:
    """A compiled block breaks at sparse attention and computes the same, at every step of a schedule."""
    model, inputs = tiny_gated()
    spec = "vsa:sparsity=0.6,tile=1,2,2,dense_steps=1"
    table = resolve_attention(spec, CPU, (Role("self", grid=True), Role("cross", key_bias=True)))
    with torch.no_grad(), forward_context(ForwardContext(table)):
        expected = model(**inputs)
        for block in model.blocks:
            block.compile(backend="aot_eager")
        torch.testing.assert_close(model(**inputs), expected, rtol=0, atol=1e-5)


def tiny_gated() -> tuple[WanTransformer3DModel, dict[str, Any]]:
    """A Wan transformer with compression gates, and inputs of a grid 3 x 3 x 4."""
    config = WanConfig(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, ffn_dim=16,
        num_layers=2, compress_gates=True,
    )  # fmt: skip
    model = WanTransformer3DModel(config).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    perturb(model, 1, 0.1)
    generator = torch.Generator().manual_seed(2)
    inputs = {
        "latents": torch.randn(1, 4, 3, 6, 8, generator=generator),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 5, 8, generator=generator),
    }
    return model, inputs


def test_gates_begin_at_zero() -> None:
    """Training from nothing begins with the exact part of video sparse attention alone."""
    model, _ = tiny_gated()
    model.init_weights(torch.Generator().manual_seed(0))
    gates = [block.to_gate_compress for block in model.blocks]
    assert not any(gate.weight.any() or gate.bias.any() for gate in gates)  # pyright: ignore


def test_gates_of_wan_are_used_by_vsa_alone() -> None:
    """O = O_s + gate O_c in each block, the gate a projection of what the queries are projected from."""
    model, inputs = tiny_gated()
    spec, grid = "vsa:sparsity=0.6,tile=1,2,2", (3, 3, 4)
    got = forward(model, inputs, "self", spec)
    projected: dict[int, Tensor] = {}
    for number, block in enumerate(model.blocks):
        gate: Any = block.to_gate_compress
        block.norm1.register_forward_hook(  # pyright: ignore[reportCallIssue]
            lambda module, args, out, n=number, g=gate: projected.__setitem__(n, g(out).view(1, -1, 2, 12))
        )
    plain = make_sparse(spec)

    def by_hand(q: Tensor, k: Tensor, v: Tensor, *, key_bias: Tensor | None = None) -> Tensor:
        context = current_context()
        assert context is not None
        return plain.over_grid(q, k, v, grid=grid) + projected[context.layer] * vsa_coarse(q, k, v, grid, (1, 2, 2))

    with torch.no_grad(), forward_context(ForwardContext({"self": by_hand})):
        expected = model(**inputs)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    for block in model.blocks:
        block.to_gate_compress.weight.data.add_(1.0)  # pyright: ignore
    assert (forward(model, inputs, "self", spec) - got).abs().max() > 1e-3
    for spec in ("auto", "sta:window=1,1,1,tile=2,2,2"):  # read by no other
        with_gates = forward(model, inputs, "self", spec)
        for block in model.blocks:
            block.to_gate_compress.weight.data.add_(1.0)  # pyright: ignore
        assert torch.equal(forward(model, inputs, "self", spec), with_gates)


# -- through the generator --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_wan(tmp_path_factory.mktemp("models") / "tiny")


SMALL = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 3, "guidance_scale": 3.0}


def test_a_schedule_through_the_engine(tiny: Path) -> None:
    """Dense for all steps is the dense run bit for bit; dense for the first alone equals it there, no longer."""

    def latents(attention: str, cfg: str = "sequential") -> list[Tensor]:
        made: list[Tensor] = []
        generator = VideoGenerator.from_pretrained(tiny, device="cpu", attention=attention, cfg=cfg)
        events = generator.iterate("a red circle", **SMALL)
        for event in events:
            if getattr(event, "latents", None) is not None and getattr(event, "kind", "") == "step":
                made.append(event.latents.clone())
        return made

    spec = "vsa:sparsity=0.7,tile=1,1,1"
    dense = latents("auto")
    assert len(dense) == 3
    all_dense, one_dense, sparse = (latents(f"{spec}{more}") for more in (",dense_steps=3", ",dense_steps=1", ""))
    assert all(torch.equal(a, b) for a, b in zip(all_dense, dense, strict=True))
    assert torch.equal(one_dense[0], dense[0]) and not torch.allclose(one_dense[1], dense[1], atol=1e-4)
    assert not torch.allclose(sparse[0], dense[0], atol=1e-4)
    batched = latents(f"{spec},dense_steps=1", "batched")
    assert all((a - b).abs().max() < 1e-4 * b.std() for a, b in zip(batched, one_dense, strict=True))


def test_gates_of_fast_wan_through_the_engine(tmp_path: Path) -> None:
    """The gates that its files hold count under VSA, and under nothing else."""
    plain = make_directory(tmp_path / "plain")
    shutil.copytree(plain, tmp_path / "gates")
    add_gates(tmp_path / "gates")
    fields = {"height": 32, "width": 32, "num_frames": 5}

    def made(name: str, attention: str) -> Tensor:
        generator = VideoGenerator.from_pretrained(tmp_path / name, device="cpu", attention=attention)
        return generator.generate_video("a red circle", **fields).latents

    assert torch.equal(made("plain", "auto"), made("gates", "auto"))
    spec = "vsa:sparsity=0.8,tile=1,1,1"
    assert not torch.allclose(made("plain", spec), made("gates", spec), atol=1e-2)


def test_settings_are_kept_and_refused_at_start(tiny: Path) -> None:
    spec = "self=sta:window=3,3,3,tile=2,4,4;cross=math"
    assert VideoGenerator.from_pretrained(tiny, device="cpu", attention=spec).options["attention"] == spec
    with pytest.raises(CompositionError, match="'flash2' for 'self' cannot serve on cpu"):
        VideoGenerator.from_pretrained(tiny, device="cpu", attention="flash2")
