"""LoRA with compiled, quantized, offloaded and cached transformers, and in sessions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kinetoscope import VideoGenerator
from kinetoscope.core.errors import CompositionError
from kinetoscope.core.lora import LowRank
from kinetoscope.nn import linear
from kinetoscope.nn.lora import SidePath
from kinetoscope.runtime.settings import parse_configuration
from lora_files import deltas, factors, tensors, write
from tiny import make_tiny_wan

SMALL: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "fps": 8}
PAIRS = {"one": factors(1), "two": factors(2, rank=2)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loras")
    return {n: write(folder / f"{n}.safetensors", tensors("kohya", p, 4.0)) for n, p in PAIRS.items()}


def latents(generator: VideoGenerator, **fields: Any) -> Tensor:
    return generator.generate_video("a red cat", seed=3, **SMALL | fields).latents


def merged(path: Path, *changes: tuple[str, dict[str, Tensor], float]) -> VideoGenerator:
    """The oracle: (component, parameter -> delta, weight) added to the loaded weights by hand."""
    generator = VideoGenerator.from_pretrained(path, device="cpu")
    for component, delta, weight in changes:
        parameters = dict(generator.pipeline.get_module(component).named_parameters())
        for name, value in delta.items():
            parameters[name].data += weight * value
    return generator


def near(got: Tensor, expected: Tensor, base: Tensor) -> None:
    assert (expected - base).abs().max() > 0.05 * base.std()
    assert (got - expected).abs().max() <= 1e-4 * expected.std()


def test_compiled_blocks_are_not_compiled_again(tiny: Path, files: dict[str, Path]) -> None:
    """Weights change where they are, so the graphs stay; the same for the path beside quantized layers."""
    generator = VideoGenerator.from_pretrained(tiny, device="cpu", lora=files["one"])
    compiled: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(1)
        return graph.forward

    module = generator.pipeline.get_module("transformer")
    for block in module.blocks:
        block.compile(backend=backend)
    latents(generator)
    count = len(compiled)
    assert count > 0
    generator.load_lora(files["two"])
    generator.set_lora({"one": 0.5, "two": -1.0})
    changes = [("transformer", deltas(PAIRS["one"]), 0.5), ("transformer", deltas(PAIRS["two"], 2.0), -1.0)]
    near(latents(generator), latents(merged(tiny, *changes)), latents(merged(tiny)))
    assert len(compiled) == count
    torch._dynamo.reset()


class Packed(nn.Module):
    """A linear layer whose weight is not a parameter that could be added to."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("packed", layer.weight.detach().half())
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.packed.to(x.dtype), self.bias)


def packed(generator: VideoGenerator) -> nn.Module:
    module = generator.pipeline.get_module("transformer")
    for block in module.blocks:
        for parent, name in ((block.attn1, "to_q"), (block.attn2, "to_k"), (block.ffn.net[0], "proj")):
            setattr(parent, name, Packed(getattr(parent, name)))
    return module


def test_layers_that_cannot_be_added_to_get_a_path_beside(tiny: Path, files: dict[str, Path], tmp_path: Path) -> None:
    generator = VideoGenerator.from_pretrained(tiny, device="cpu")
    module = packed(generator)
    base = latents(generator)
    generator.load_lora(files["one"])
    generator.load_lora(files["two"], weight=0.5)
    full = torch.randn(24, 24, generator=torch.Generator().manual_seed(1)) * 0.2
    bias = torch.ones(24) * 0.1
    path = write(tmp_path / "f.safetensors", {"blocks.0.self_attn.q.diff": full, "blocks.0.self_attn.q.diff_b": bias})
    generator.load_lora(path)
    expected = VideoGenerator.from_pretrained(tiny, device="cpu")
    parameters = dict(packed(expected).named_parameters()) | dict(
        expected.pipeline.get_module("transformer").named_buffers()
    )
    whole = {"blocks.0.attn1.to_q.weight": full, "blocks.0.attn1.to_q.bias": bias}
    for changes, weight in ((deltas(PAIRS["one"]), 1.0), (deltas(PAIRS["two"], 2.0), 0.5), (whole, 1.0)):
        for name, delta in changes.items():
            if name not in parameters:  # packed: kept in float32, so that the oracle rounds as ours does
                name = name.replace("weight", "packed")
                owner = expected.pipeline.get_module("transformer").get_submodule(name.rpartition(".")[0])
                owner.packed = owner.packed.float() + weight * delta
            else:
                parameters[name].data += weight * delta
    near(latents(generator), latents(expected), base)

    compiled: list[int] = []
    for block in module.blocks:
        block.compile(backend=lambda graph, inputs: compiled.append(1) or graph.forward)
    latents(generator)
    count = len(compiled)
    generator.set_lora({"one": 0.3})
    got = latents(generator)
    assert len(compiled) == count
    for block in module.blocks:
        block._compiled_call_impl = None
    near(got, latents(generator), base)
    for name in list(generator.loras):
        generator.unload_lora(name)
    assert torch.equal(latents(generator), base)
    assert not any(layer._forward_hooks for layer in module.modules())
    torch._dynamo.reset()


def test_quantized_by_torchao(tiny: Path, files: dict[str, Path]) -> None:
    """The same change of the output as without quantization, to its rounding."""
    pytest.importorskip("torchao")
    quantized = VideoGenerator.from_pretrained(tiny, device="cpu", quantize="int8")
    base = latents(quantized)
    quantized.load_lora(files["one"], weight=0.5)
    exact = merged(tiny)
    change = latents(merged(tiny, ("transformer", deltas(PAIRS["one"]), 0.5))) - latents(exact)
    got = latents(quantized) - base
    assert torch.nn.functional.cosine_similarity(got.flatten(), change.flatten(), dim=0) > 0.99
    quantized.unload_lora("one")
    assert torch.equal(latents(quantized), base)


def test_fast_paths_do_not_pass_a_layer_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer with a path beside it is called as a module, never by its weight alone."""
    draw = torch.Generator().manual_seed(0)
    layer, x = linear.Linear(8, 8), torch.randn(3, 8, generator=draw)
    monkeypatch.setattr(linear, "onednn_serves", lambda x, weight: True)
    monkeypatch.setattr(linear, "onednn_linear", lambda x, weight, bias, gelu=False: torch.full_like(x, 7.0))
    with torch.no_grad():
        assert (layer(x) == 7).all() and (linear.linear_gelu(layer, x) == 7).all()
        down, up = torch.randn(2, 8, generator=draw), torch.randn(8, 2, generator=draw)
        SidePath(layer).set(((LowRank(down, up, 1.0), 1.0),), torch.float32)
        expected = 7 + nn.functional.linear(x, up @ down)
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(linear.linear_gelu(layer, x), nn.functional.gelu(expected, approximate="tanh"))


def test_a_session_keeps_what_it_began_with(tmp_path: Path) -> None:
    from pipelines.test_causal_wan import make_directory

    generator = VideoGenerator.from_pretrained(make_directory(tmp_path / "model"), device="cpu", dtype="float32")
    width = generator.pipeline.get_module("transformer").proj_out.in_features
    change = {"diffusion_model.blocks.0.self_attn.o.diff_b": torch.ones(width)}
    generator.load_lora(write(tmp_path / "a.safetensors", change))
    fields: dict[str, Any] = {"height": 32, "width": 48, "seed": 2}
    with generator.start_session("a red circle", **fields) as session:
        expected = [session.step(), session.step()]
    session = generator.start_session("a red circle", **fields)
    first = session.step()
    generator.set_lora({})
    assert (first == expected[0]).all() and (session.step() == expected[1]).all()
    with pytest.raises(CompositionError, match="in progress"):
        generator.start_session("a red circle", **fields)
    session.close()
    with generator.start_session("a red circle", **fields) as plain:
        assert (plain.step() != first).any()
    with pytest.raises(Exception, match="latents"):  # a session that never began holds nothing
        generator.start_session("a red circle", latents=torch.zeros(1), **fields)
    generator.set_lora({"a": 1.0})
    with generator.start_session("a red circle", **fields) as again:
        assert (again.step() == first).all()


@pytest.mark.parametrize(
    "options",
    [
        {"offload": "components"},
        {"offload": "blocks"},
        {"quantize": "int8", "offload": "blocks"},
        {"cfg": "batched", "cache": "fbcache:threshold=0.0"},
    ],
    ids=str,
)
def test_options_compose(tiny: Path, files: dict[str, Path], options: dict[str, Any]) -> None:
    """The video of weights that were merged by hand; with offload, bit for bit the one without."""
    if "quantize" in options:
        pytest.importorskip("torchao")
    generator = VideoGenerator.from_pretrained(tiny, device="cpu", lora=files["one"], **options)
    got = latents(generator)
    plain = {k: v for k, v in options.items() if k != "offload"}
    if len(plain) < len(options):
        expected = latents(VideoGenerator.from_pretrained(tiny, device="cpu", lora=files["one"], **plain))
        assert torch.equal(got, expected)
    else:
        by_hand = merged(tiny, ("transformer", deltas(PAIRS["one"]), 1.0)).pipeline.loaded_modules()
        expected = latents(VideoGenerator.from_pretrained(tiny, device="cpu", modules=by_hand, **options))
        near(got, expected, latents(merged(tiny)))
    generator.unload_lora("one")
    base = VideoGenerator.from_pretrained(tiny, device="cpu", **options)
    assert torch.equal(latents(generator), latents(base))


def test_lists_of_prompts_share_their_steps(tiny: Path, files: dict[str, Path]) -> None:
    generator = VideoGenerator.from_pretrained(tiny, device="cpu", lora=files["one"])
    prompts = ["a red cat", "a blue circle moving left on black"]
    results = generator.generate_video(prompts, seed=3, **SMALL)
    oracle = merged(tiny, ("transformer", deltas(PAIRS["one"]), 1.0))
    for prompt, result in zip(prompts, results, strict=True):
        expected = oracle.generate_video(prompt, seed=3, **SMALL).latents
        assert (result.latents - expected).abs().max() <= 1e-4 * expected.std()


def test_a_configuration_as_text() -> None:
    options = parse_configuration("lora=transformer_2=a.safetensors:0.5, cfg=batched").options
    assert options == {"lora": "transformer_2=a.safetensors:0.5", "cfg": "batched"}
