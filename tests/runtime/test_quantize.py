"""8-bit weights: what torchao computes is what the arithmetic written out here computes; and how much is lost."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kinetoscope import VideoGenerator
from kinetoscope.core.cpu import CpuLevel, cpu_level
from kinetoscope.core.errors import CompositionError, ConfigError
from kinetoscope.loading.offload import changed_parts
from kinetoscope.loading.quantize import QUANTIZATIONS, check_quantization, quantize_blocks, quantized_layers
from kinetoscope.nn.linear import Linear, linear_gelu
from runtime.families import FAMILIES, LONG, open_family
from tiny import make_tiny_wan

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


@pytest.fixture(autouse=True)
def int8_products() -> Iterator[None]:
    """Multiply 8-bit matrices as a CPU of this level does.

    `torch._int_mm` asks the processor for 8-bit products, and not the switches by which a level is run here; oneDNN,
    held below them, would give it sums that saturate.
    """
    held = cpu_level() < CpuLevel.AVX512_BF16 and torch.cpu._is_vnni_supported()  # pyright: ignore
    with torch.backends.mkldnn.flags(enabled=False) if held else nullcontext():
        yield


INT8, FP8 = 127.5, 448.0  # half the range of -128..127; the largest float8 e4m3


def int8(x: Tensor) -> Tensor:
    """x [..., n] rounded to 8-bit numbers times one scale a row."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).eps) / INT8
    return (x * (1 / scale)).round().clamp(
        -128, 127
    ) * scale  # the largest is 127.5: its last bit decides, as in torchao


def fp8(x: Tensor) -> Tensor:
    """x [..., n] rounded to float8 times one scale a row."""
    scale = x.abs().amax(-1, keepdim=True) / FP8
    return (x / scale).clamp(-FP8, FP8).to(torch.float8_e4m3fn).float() * scale


ROUNDED: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "int8": (int8, lambda x: x),
    "int8-dynamic": (int8, int8),
    "fp8": (fp8, lambda x: x),
}


class WrittenOut(nn.Module):
    """A linear layer whose weight, and input where the kind is dynamic, went through 8 bits."""

    def __init__(self, layer: nn.Linear, kind: str) -> None:
        super().__init__()
        weight, self.rounded = ROUNDED[kind]
        self.weight, self.bias = nn.Parameter(weight(layer.weight), requires_grad=False), layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.rounded(x), self.weight, self.bias)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_wan(tmp_path_factory.mktemp("wan"))


def latents(path: Path, written_out: str | None = None, **options: Any) -> Tensor:
    generator = VideoGenerator.from_pretrained(path, device="cpu", **options)
    if written_out:
        transformer = generator.pipeline.get_module("transformer")
        for name, layer in list(quantized_layers(transformer)):
            parent, _, leaf = name.rpartition(".")
            setattr(transformer.get_submodule(parent), leaf, WrittenOut(layer, written_out))
    return generator.generate_video(LONG, **FAMILIES["wan"].request(num_inference_steps=3)).latents


@pytest.mark.parametrize("kind", ROUNDED)
def test_latents_are_those_of_the_written_out_arithmetic(path: Path, kind: str, record_property: Any) -> None:
    exact, expected, got = latents(path), latents(path, kind), latents(path, quantize=kind)
    lost = ((expected - exact).abs().max() / exact.std()).item()
    record_property("largest_difference_in_std", lost)
    assert 1e-4 < lost < 0.5, "8 bits lose something, and not much"
    # Rounding of inputs turns over where two sums differ in their last bits; from there on two runs are only as near to
    # each other as both are to the exact one. One layer is compared tightly below.
    tolerance = lost if QUANTIZATIONS[kind].dynamic else 1e-4
    assert (got - expected).abs().max() <= tolerance * exact.std()


@pytest.mark.parametrize("kind", ROUNDED)
def test_one_layer(kind: str) -> None:
    layer = nn.Linear(48, 32).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for tensor in (layer.weight, layer.bias, x := torch.empty(2, 5, 48)):
        tensor.normal_(generator=generator)
    model, expected = one_block(layer), WrittenOut(layer, kind)(x)
    assert quantize_blocks(model, kind) == 1
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=2e-5)


def one_block(layer: nn.Module) -> nn.Module:
    """A transformer of one block of one layer."""
    block, model = nn.Module(), nn.Module()
    block.layer, model.blocks = layer, nn.ModuleList([block])
    return model


@pytest.mark.parametrize("name", ["wan", "cosmos", "hunyuan", "longcat"])
def test_which_layers(name: str, tmp_path: Path) -> None:
    """Most weights of the blocks, and nothing around them, no modulation, nothing that stays in float32."""
    transformer = open_family(name, tmp_path / "model").pipeline.get_module("transformer")
    chosen = dict(quantized_layers(transformer))
    inside = {f"{n}." for n, m in transformer.named_modules() if any(m is b for b in transformer.blocks)}
    assert all(any(layer.startswith(block) for block in inside) for layer in chosen)
    forbidden = {"norm", "norm1", "norm2", "norm3", "adaLN_modulation", *transformer.keep_in_float32}
    assert not [layer for layer in chosen if forbidden & set(layer.split("."))]
    linears = [m for b in transformer.blocks for m in b.modules() if isinstance(m, nn.Linear)]
    assert sum(m.weight.numel() for m in chosen.values()) > 0.5 * sum(m.weight.numel() for m in linears)


def test_a_quantized_layer_is_never_taken_for_a_plain_one() -> None:
    """Fast paths read weights past the layer; they must leave quantized ones alone."""
    layer = Linear(32, 16).requires_grad_(False)
    x = torch.linspace(-1, 1, 64).view(2, 32)
    expected = F.gelu(F.linear(x, int8(layer.weight), layer.bias), approximate="tanh")
    assert quantize_blocks(one_block(layer), "int8") == 1
    assert layer.weight.element_size() == 4 and layer.weight.qdata.dtype == torch.int8
    torch.testing.assert_close(linear_gelu(layer, x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_quantized_weight_is_moved_by_its_parts(kind: str) -> None:
    """Pinning and streams of offload work on plain tensors; what is put together again computes the same."""
    layer, x = nn.Linear(32, 16).requires_grad_(False), torch.linspace(-1, 1, 64).view(2, 32)
    quantize_blocks(one_block(layer), kind)
    expected, seen = layer(x), list[torch.dtype]()
    again = changed_parts(layer.weight, lambda part: seen.append(part.dtype) or part.clone())
    assert {torch.int8, torch.float8_e4m3fn} & set(seen) and torch.float32 in seen
    layer.weight = nn.Parameter(again, requires_grad=False)
    assert torch.equal(layer(x), expected)
    assert changed_parts(layer.weight, lambda part: None).dtype == torch.float32  # nothing to change


def test_quantized_weights_go_on_and_off_the_device(path: Path) -> None:
    assert torch.equal(latents(path, quantize="int8", offload="blocks"), latents(path, quantize="int8"))


def test_replay_keeps_the_option(path: Path, tmp_path: Path) -> None:
    from kinetoscope.runtime.replay import replay

    generator = VideoGenerator.from_pretrained(path, device="cpu", quantize="int8")
    generator.generate_video(LONG, output_path=tmp_path / "a.mp4", **FAMILIES["wan"].request())
    assert replay(tmp_path / "a.mp4", model=str(path)).identical


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"quantize": "int3"}, ConfigError, r"'int3'; did you mean int8\? Known: int8, int8-dynamic, fp8, fp8-dynamic"),
        ({"quantize": "fp8-dynamic"}, CompositionError, r"'fp8-dynamic'.*'cpu'"),
        ({"quantize": "int8", "autocast": True}, CompositionError, r"'int8' and autocast"),
        ({"quantize": "int8", "modules": {"transformer": nn.Linear(1, 1)}}, CompositionError, r"'int8' and modules="),
    ],
)
def test_refused_at_start(path: Path, options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        VideoGenerator.from_pretrained(path, device="cpu", **options)


PRODUCTS = """
import json, os, sys
import torch
for limit in sys.argv[1:]:
    if os.fork():
        os.wait()
        continue
    os.environ["ONEDNN_MAX_CPU_ISA"] = limit  # read by oneDNN when it is first used, in this process
    from kinetoscope.core.errors import CompositionError
    from kinetoscope.loading.quantize import check_quantization
    generator, wrong, refused = torch.Generator().manual_seed(0), False, ""
    for rows, inner, columns in ((8, 16, 8), (1, 64, 64), (33, 48, 32), (17, 1024, 24)):
        a = torch.randint(-128, 128, (rows, inner), dtype=torch.int8, generator=generator)
        b = torch.randint(-128, 128, (columns, inner), dtype=torch.int8, generator=generator).t()
        wrong = wrong or not torch.equal(torch._int_mm(a, b).long(), a.long() @ b.long())
    try:
        check_quantization("int8-dynamic", torch.device("cpu"), torch.float32)
        check_quantization("int8", torch.device("cpu"), torch.float32)
    except CompositionError as error:
        refused = str(error)
    print(json.dumps([limit, wrong, refused, torch.cpu._is_vnni_supported()]), flush=True)
    os._exit(0)
"""
"""Compares `torch._int_mm` to products of integers with oneDNN limited to each instruction set, one process each."""


def test_dynamic_int8_is_refused_exactly_where_its_products_are_wrong() -> None:
    limits = ("", "AVX2", "AVX512_CORE", "AVX512_CORE_VNNI")
    command = [sys.executable, "-c", PRODUCTS, *limits]
    environment = {k: v for k, v in os.environ.items() if k != "DNNL_MAX_CPU_ISA"}  # noqa: TID251 - of the child
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [limit for limit, *_ in told] == list(limits), done.stderr
    for limit, wrong, refused, vnni in told:
        assert bool(refused) == wrong, (limit, refused)
        assert not refused or refused == (
            f"quantize='int8-dynamic': torch adds 8-bit products wrongly here, since ONEDNN_MAX_CPU_ISA={limit} holds "
            "oneDNN below the 8-bit instructions (VNNI) of this processor; unset ONEDNN_MAX_CPU_ISA, set it to "
            "AVX512_CORE_VNNI or higher, or use int8"
        )
        assert wrong == (vnni and limit in ("AVX2", "AVX512_CORE")), limit


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"torchao.*kinetoscope\[quant\]"):
        check_quantization("int8", torch.device("cpu"), torch.float32)
