"""Compiled blocks: one graph for all layers, steps, prompts and seeds; and what cannot be compiled is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from kinetoscope import VideoGenerator
from kinetoscope.core.errors import CompositionError, ConfigError
from kinetoscope.loading.offload import Offload
from kinetoscope.nn import compile as module
from kinetoscope.runtime import care
from runtime.families import FAMILIES, LONG, SHORT, open_family
from runtime.movers import Elsewhere

KINDS = {"wan": 1, "causal": 5, "skyreels": 1, "cosmos": 1, "hunyuan": 2, "hunyuan15": 1, "ltx": 1, "longcat": 1}
"""Graphs of a family: one a kind of block. A causal block is cut where it reads and writes its cache, and its keys are
first alone and then of changing number."""
USUAL = ("wan", "causal", "hunyuan")


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """Counts graphs; nothing is generated, so the bits stay those of plain blocks."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    original = module.compile_blocks
    monkeypatch.setattr(care, "compile_blocks", lambda part, mode: original(part, mode, counter))
    monkeypatch.setattr(module, "missing_compiler", lambda device: None)
    yield counter
    torch._dynamo.reset()


@pytest.mark.parametrize("name", [n if n in USUAL else pytest.param(n, marks=pytest.mark.slow) for n in KINDS])
def test_no_recompiles(name: str, tmp_path: Path, compiles: CompileCounterWithBackend) -> None:
    """Across layers, steps, seeds, and prompts of other lengths; with the bits of blocks that are not compiled."""
    request = FAMILIES[name].request
    compiled, plain = (open_family(name, tmp_path / "model", compile=c) for c in (True, False))
    compiled.generate_video(SHORT, **request())
    graphs = compiles.frame_count
    assert graphs == KINDS[name]
    with torch._dynamo.config.patch(error_on_recompile=True):
        result = compiled.generate_video(SHORT, **request(seed=4))
        compiled.generate_video(LONG, **request(seed=5))
    assert compiles.frame_count == graphs
    assert torch.equal(result.latents, plain.generate_video(SHORT, **request(seed=4)).latents)


@pytest.mark.parametrize("cache", ["taylorseer:interval=2,warmup=1", "fbcache:threshold=0.5"])
def test_a_step_cache_over_compiled_blocks(tmp_path: Path, compiles: CompileCounterWithBackend, cache: str) -> None:
    """Where rows agree no graph is added, and the bits are those of blocks that are not compiled."""
    request = FAMILIES["wan"].request(num_inference_steps=6)
    compiled, plain = (open_family("wan", tmp_path / "model", compile=c, cache=cache) for c in (True, False))
    result = compiled.generate_video(SHORT, **request)
    assert compiles.frame_count == 1 and result.logging_info["step_cache"]["skipped"] > 0
    assert torch.equal(result.latents, plain.generate_video(SHORT, **request).latents)


def test_a_length_that_is_not_told_recompiles(
    tmp_path: Path, compiles: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the count above would see: without the mark, the second length of text makes a second graph."""
    monkeypatch.setattr(module, "_mark", lambda value, axes: None)
    generator = open_family("wan", tmp_path / "model", compile=True)
    for prompt in (SHORT, LONG):
        generator.generate_video(prompt, **FAMILIES["wan"].request())
    assert compiles.frame_count == 2


@pytest.mark.parametrize(
    "options",
    [
        {"cache": "fbcache:threshold=0.5,warmup=1", "cfg": "batched"},
        {"offload": "blocks"},
        {"quantize": "int8"},
    ],
    ids=lambda options: " ".join(options),
)
def test_together_with(
    options: dict[str, Any], tmp_path: Path, compiles: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands around blocks, moves or replaces their weights: the bits of the same without compiling."""
    monkeypatch.setattr(care, "Offload", lambda kind, device, _: Offload(kind, device, Elsewhere()))
    request = FAMILIES["wan"].request
    compiled, plain = (open_family("wan", tmp_path / "model", compile=c, **options) for c in (True, False))
    compiled.generate_video(SHORT, **request(num_inference_steps=5))
    graphs = compiles.frame_count
    assert graphs >= 1
    with torch._dynamo.config.patch(error_on_recompile=True):
        result = compiled.generate_video(LONG, **request(num_inference_steps=5, seed=8))
    assert compiles.frame_count == graphs
    expected = plain.generate_video(LONG, **request(num_inference_steps=5, seed=8))
    assert torch.equal(result.latents, expected.latents)
    if "cache" in options:
        assert result.logging_info["step_cache"] == expected.logging_info["step_cache"]


@pytest.mark.slow
def test_generated_code_agrees(tmp_path: Path) -> None:
    """Inductor's own kernels, to rounding; needs a C++ compiler."""
    request = FAMILIES["wan"].request
    plain, compiled = (open_family("wan", tmp_path / "model", compile=c) for c in (False, "default"))
    expected = plain.generate_video(LONG, **request()).latents
    for prompt in (SHORT, LONG):
        result = compiled.generate_video(prompt, **request())
    assert (result.latents - expected).abs().max() <= 1e-4 * expected.std()


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"compile": "fastest"}, ConfigError, r"'fastest'; known: default, reduce-overhead, max-autotune"),
        ({"compile": "reduce-overhead"}, CompositionError, r"'reduce-overhead'.*'cpu'"),
    ],
)
def test_refused_at_start(tmp_path: Path, options: dict[str, Any], error: type[Exception], says: str) -> None:
    open_family("wan", tmp_path / "model")
    with pytest.raises(error, match=says):
        VideoGenerator.from_pretrained(tmp_path / "model", device="cpu", **options)


def test_no_compiler_is_said_at_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    def nothing() -> str:
        raise exc.InvalidCxxCompiler()

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", nothing)
    with pytest.raises(ConfigError, match=r"C\+\+ compiler.*install g\+\+"):
        open_family("wan", tmp_path / "model", compile=True)
