"""LoRAs of a generator: stacked, weighted, unloaded between runs; with experts, compile, quantization, replay."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kinetoscope import VideoGenerator
from kinetoscope.cli import main
from kinetoscope.core.errors import CompositionError, ConfigError, ModelLoadError
from kinetoscope.engine.protocols import Event
from kinetoscope.media import read_metadata
from kinetoscope.runtime.lora import lora_specs
from kinetoscope.runtime.replay import replay
from lora_files import deltas, factors, tensors, write
from tiny import make_tiny_wan

SMALL: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "fps": 8}
PAIRS = {"one": factors(1), "two": factors(2, rank=2)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def tiny_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_wan(tmp_path_factory.mktemp("experts"), kind="a14b")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loras")
    found = {n: write(folder / f"{n}.safetensors", tensors("kohya", p, 4.0)) for n, p in PAIRS.items()}
    experts = tensors("diffusers", PAIRS["one"]) | tensors("diffusers-2", PAIRS["two"])
    return found | {"experts": write(folder / "experts.safetensors", experts)}


@pytest.fixture(scope="module")
def shared(tiny: Path) -> VideoGenerator:
    return VideoGenerator.from_pretrained(tiny, device="cpu")


@pytest.fixture
def generator(shared: VideoGenerator) -> Iterator[VideoGenerator]:
    yield shared
    for name in shared.loras:
        shared.unload_lora(name)


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


def weights(generator: VideoGenerator, component: str = "transformer") -> dict[str, Tensor]:
    return {n: v.clone() for n, v in generator.pipeline.get_module(component).state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[n], b[n]) for n in a)


def near(got: Tensor, expected: Tensor, base: Tensor) -> None:
    assert (expected - base).abs().max() > 0.05 * base.std()
    assert (got - expected).abs().max() <= 1e-4 * expected.std()


def test_stack_weigh_and_unload(generator: VideoGenerator, tiny: Path, files: dict[str, Path]) -> None:
    """Alphas are 4: the scale is 1 for rank 4 and 2 for rank 2."""
    before, base = weights(generator), latents(generator)
    module = generator.pipeline.get_module("transformer")
    one = generator.load_lora(files["one"])
    assert (one.name, one.weight, one.components, one.ranks, one.unmatched) == ("one", 1.0, ("transformer",), (4,), ())
    generator.load_lora(files["two"], "second", weight=-0.5)
    assert list(generator.loras) == ["one", "second"]
    a, b = deltas(PAIRS["one"]), deltas(PAIRS["two"], 2.0)
    expected = merged(tiny, ("transformer", a, 1.0), ("transformer", b, -0.5))
    for name, value in weights(generator).items():
        torch.testing.assert_close(value, weights(expected)[name], rtol=1e-5, atol=1e-6)
    near(latents(generator), latents(expected), base)

    generator.set_lora({"second": 2.0})  # those not named rest
    assert generator.loras["one"].weight == 0.0
    near(latents(generator), latents(merged(tiny, ("transformer", b, 2.0))), base)
    generator.set_lora({})
    assert same(weights(generator), before) and torch.equal(latents(generator), base)
    generator.set_lora({"one": 0.7, "second": 0.3})
    generator.unload_lora("second")
    near(latents(generator), latents(merged(tiny, ("transformer", a, 0.7))), base)
    generator.unload_lora("one")
    assert same(weights(generator), before) and torch.equal(latents(generator), base)
    assert generator.pipeline.get_module("transformer") is module  # nothing was loaded again


def test_prepared_text_keys_see_it(generator: VideoGenerator, tmp_path: Path) -> None:
    """Keys and values of the text are computed once a run, outside the blocks."""
    base = latents(generator)
    only = {n: p for n, p in PAIRS["one"].items() if n.endswith(("cross_attn.k", "cross_attn.v"))}
    generator.load_lora(write(tmp_path / "a.safetensors", tensors("comfyui", only)))
    module = generator.pipeline.get_module("transformer")
    text = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        prepared = module.prepare_conditioning(encoder_hidden_states=text)["text"]
        embedded = module.condition_embedder.text_embedder(text)
        by_hand = merged(Path(generator.pipeline.model.path), ("transformer", deltas(only), 1.0))
        attention = by_hand.pipeline.get_module("transformer").blocks[1].attn2
        keys, values = attention.project(embedded)
    torch.testing.assert_close(prepared.keys[1], keys, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(prepared.values[1], values, rtol=1e-5, atol=1e-5)
    near(latents(generator), latents(by_hand), base)


def test_opening_with_loras_loads_the_weights_when_they_are_needed(
    tiny: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    spec = [f"{files['one']}:0.5", {"path": files["two"], "name": "b", "weight": 1.5}]
    generator = VideoGenerator.from_pretrained(tiny, device="cpu", lora=spec)
    assert generator.pipeline.loaded_modules() == {}  # checked from the headers
    assert [(x.name, x.weight) for x in generator.loras.values()] == [("one", 0.5), ("b", 1.5)]
    changes = [("transformer", deltas(PAIRS["one"]), 0.5), ("transformer", deltas(PAIRS["two"], 2.0), 1.5)]
    near(latents(generator), latents(merged(tiny, *changes)), latents(merged(tiny)))


def test_a_run_in_progress_keeps_what_it_began_with(generator: VideoGenerator, files: dict[str, Path]) -> None:
    base = latents(generator)
    generator.load_lora(files["one"])
    with_one = latents(generator)

    events = generator.iterate("a red cat", seed=3, **SMALL)
    while not isinstance(next(events), Event):
        pass
    generator.load_lora(files["two"])  # for later runs
    generator.set_lora({"two": 1.0})
    with pytest.raises(CompositionError, match="a run is in progress"):
        latents(generator)
    try:
        while True:
            next(events)
    except StopIteration as stop:
        assert torch.equal(stop.value[0].latents, with_one)
        assert [(r["name"], r["weight"]) for r in stop.value[0].record["options"]["lora"]] == [("one", 1.0)]
    later = latents(generator)
    assert not torch.allclose(later, with_one)

    events = generator.iterate("a red cat", seed=3, **SMALL)
    next(events)
    generator.set_lora({})
    events.close()  # a run that was given up holds nothing
    assert torch.equal(latents(generator), base)


def test_runs_with_the_same_loras_interleave(generator: VideoGenerator, files: dict[str, Path]) -> None:
    generator.load_lora(files["one"])
    alone = latents(generator)
    first, second = (generator.iterate("a red cat", seed=3, **SMALL) for _ in range(2))
    next(first), next(second)
    for events in (first, second):
        try:
            while True:
                next(events)
        except StopIteration as stop:
            assert torch.equal(stop.value[0].latents, alone)


def test_a_weight_that_arrives_in_the_middle_gets_what_the_run_began_with(tiny: Path, files: dict[str, Path]) -> None:
    """Components load when a stage first needs them, perhaps after the LoRAs were set anew."""
    generator = VideoGenerator.from_pretrained(tiny, device="cpu", lora=files["one"])
    events = generator.iterate("a red cat", seed=3, **SMALL)
    next(events)
    assert "transformer" not in generator.pipeline.loaded_modules()
    generator.set_lora({})
    try:
        while True:
            next(events)
    except StopIteration as stop:
        got = stop.value[0].latents
    near(got, latents(merged(tiny, ("transformer", deltas(PAIRS["one"]), 1.0))), latents(generator))


def test_generators_that_share_a_transformer_keep_apart(generator: VideoGenerator, files: dict[str, Path]) -> None:
    base = latents(generator)
    other = VideoGenerator.from_pretrained(
        generator.pipeline.model, device="cpu", modules=generator.pipeline.loaded_modules()
    )
    other.load_lora(files["one"])
    with_one = latents(other)
    assert torch.equal(latents(generator), base) and not torch.equal(with_one, base)
    assert torch.equal(latents(other), with_one)
    events = other.iterate("a red cat", **SMALL)
    next(events)
    with pytest.raises(CompositionError, match="other LoRAs"):
        latents(generator)
    events.close()
    assert torch.equal(latents(generator), base)


def test_experts(tiny_experts: Path, files: dict[str, Path]) -> None:
    """Each of Wan 2.2's networks by itself: from one file, from two, or both from one without prefixes."""
    plain = VideoGenerator.from_pretrained(tiny_experts, device="cpu")
    base = latents(plain)
    high, low = ("transformer", deltas(PAIRS["one"]), 1.0), ("transformer_2", deltas(PAIRS["two"]), 1.0)
    plain.load_lora(files["experts"])
    assert plain.loras["experts"].components == ("transformer", "transformer_2")
    near(latents(plain), latents(merged(tiny_experts, high, low)), base)
    plain.unload_lora("experts")
    with pytest.raises(ConfigError, match=r"transformer_2.*both"):
        plain.load_lora(files["one"])
    assert torch.equal(latents(plain), base)
    plain.load_lora(files["one"], component="transformer_2")
    near(latents(plain), latents(merged(tiny_experts, ("transformer_2", high[1], 1.0))), base)
    plain.unload_lora("one")
    opened = VideoGenerator.from_pretrained(tiny_experts, device="cpu", lora=f"both={files['one']}:0.5")
    expected = merged(tiny_experts, ("transformer", high[1], 0.5), ("transformer_2", high[1], 0.5))
    near(latents(opened), latents(expected), base)


@pytest.mark.parametrize(
    ("header", "scales"),
    [
        ({"transformer.r": 4, "transformer.lora_alpha": 8, "transformer_2.lora_alpha": 1}, (2, 0.5)),
        ({"transformer_2.lora_alpha": 1}, (1, 0.5)),
        ({"transformer.lora_alpha": 8}, (2, 1)),
        ({"lora_alpha": 4}, (1, 2)),  # without a prefix: for both
        ({"transformer_2.lora_alpha": 1, "transformer_2.use_rslora": True}, (1, 0.5**0.5)),
        (
            {
                "transformer.lora_alpha": 8,
                "transformer_2.lora_alpha": 1,
                "transformer_2.alpha_pattern": {r"attn\d\.to_q": 6, "ffn.net.2": 6},
            },
            (2, 0.5),
        ),
    ],
)  # fmt: skip
def test_scales_of_each_expert_are_those_of_its_part_of_the_header(
    tiny_experts: Path, tmp_path: Path, header: dict[str, Any], scales: tuple[float, float]
) -> None:
    content = tensors("diffusers", PAIRS["one"]) | tensors("diffusers-2", PAIRS["two"])
    file = write(tmp_path / "a.safetensors", content, {"lora_adapter_metadata": json.dumps(header)})
    generator = VideoGenerator.from_pretrained(tiny_experts, device="cpu", lora=file)
    plain = VideoGenerator.from_pretrained(tiny_experts, device="cpu")
    pattern = header.get("transformer_2.alpha_pattern", {})
    for name, scale, pairs in zip(("transformer", "transformer_2"), scales, PAIRS.values(), strict=True):
        ours, before = (g.pipeline.get_module(name).state_dict() for g in (generator, plain))
        for layer, delta in deltas(pairs).items():
            own = 3.0 if name == "transformer_2" and any(re.search(p, layer) for p in pattern) else scale
            assert torch.allclose(ours[layer] - before[layer], own * delta, atol=1e-5), (layer, own)


def test_header_of_one_expert_refuses_dora_by_name(tiny_experts: Path, tmp_path: Path) -> None:
    content = tensors("diffusers", PAIRS["one"]) | tensors("diffusers-2", PAIRS["two"])
    header = {"lora_adapter_metadata": json.dumps({"transformer_2.use_dora": True})}
    with pytest.raises(ModelLoadError, match="DoRA is not supported"):
        VideoGenerator.from_pretrained(tiny_experts, lora=write(tmp_path / "a.safetensors", content, header))


# -- records, command line, bad values --------------------------------------------------------------------------------


def test_replay_loads_the_same_files_and_refuses_changed_ones(
    tiny: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    copy = tmp_path / "mine.safetensors"
    copy.write_bytes(files["one"].read_bytes())
    generator = VideoGenerator.from_pretrained(
        tiny, device="cpu", lora=[{"path": copy, "weight": 0.5}, str(files["two"])]
    )
    generator.generate_video("a cat", output_path=tmp_path / "a.mp4", **SMALL)
    recorded = read_metadata(tmp_path / "a.mp4")["options"]["lora"]
    assert [(r["path"], r["name"], r["weight"]) for r in recorded] == [
        (copy.name, "mine", 0.5), (files["two"].name, "two", 1.0),
    ]  # fmt: skip
    where: Any = {"model": str(tiny), "files": files["two"].parent}
    assert replay(tmp_path / "a.mp4", **where).identical
    write(copy, tensors("kohya", factors(8), 4.0))
    with pytest.raises(ModelLoadError, match=r"mine.safetensors has changed since"):
        replay(tmp_path / "a.mp4", **where)
    copy.unlink()
    with pytest.raises(ModelLoadError, match=r"LoRA mine: no file 'mine.safetensors' .*--files"):
        replay(tmp_path / "a.mp4", **where)


def test_command_line(tiny: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--size", "32x32", "--frames", "5", "--steps", "2", "--device", "cpu"]
    lora = ["--lora", f"{files['one']}:0.5", "--lora", str(files["two"])]
    assert main(["generate", "a cat", "--model", str(tiny), *size, *lora, "--output", str(tmp_path / "a.mp4")]) == 0
    assert [(r["name"], r["weight"]) for r in read_metadata(tmp_path / "a.mp4")["options"]["lora"]] == [
        ("one", 0.5), ("two", 1.0),
    ]  # fmt: skip
    assert main(["generate", "a cat", "--model", str(tiny), *size, "--lora", "nothing.safetensors"]) == 1
    assert "there is no LoRA file" in capsys.readouterr().err


def test_unmatched_keys_are_logged(generator: VideoGenerator, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = tensors("kohya", PAIRS["one"], 4.0) | {"lora_te_x.alpha": torch.ones(1)}
    with caplog.at_level(logging.WARNING, "kinetoscope.lora"):
        lora = generator.load_lora(write(tmp_path / "a.safetensors", content))
    assert lora.unmatched == ("lora_te_x.alpha",)
    assert "1 of 61 keys" in caplog.text and "lora_te_x.alpha" in caplog.text
    assert "1 of them change a text encoder" in caplog.text


def test_bad_values_change_nothing(generator: VideoGenerator, files: dict[str, Path], tmp_path: Path) -> None:
    generator.load_lora(files["one"])
    before, options = weights(generator), dict(generator.options)
    calls: list[tuple[Any, str]] = [
        (lambda: generator.load_lora(files["two"], "one"), "is loaded already"),
        (lambda: generator.load_lora(files["two"], weight=float("nan")), "not a finite number"),
        (lambda: generator.load_lora(files["two"], weight="1"), "not a finite number"),
        (lambda: generator.load_lora(files["two"], component="vae"), "no component 'vae'"),
        (lambda: generator.load_lora(files["two"], sha256="0" * 64), "has changed since"),
        (lambda: generator.set_lora({"two": 1.0}), "no LoRA named 'two' is loaded; loaded: one"),
        (lambda: generator.set_lora({"one": 0.5, "none": 1.0}), "no LoRA named 'none'"),
        (lambda: generator.set_lora({"one": float("inf")}), "not a finite number"),
        (lambda: generator.unload_lora("two"), "no LoRA named 'two'"),
    ]
    for call, says in calls:
        with pytest.raises((ConfigError, ModelLoadError), match=says):
            call()
    assert same(weights(generator), before) and generator.options == options
    again = generator.load_lora(files["one"])
    assert again.name == "one-2"


def test_a_change_that_the_module_cannot_take_is_taken_back(tiny: Path, tmp_path: Path) -> None:
    generator = VideoGenerator.from_pretrained(tiny, device="cpu")
    module = generator.pipeline.get_module("transformer")
    norm = module.blocks[1].norm2
    value = norm.bias.detach()
    del norm.bias
    norm.register_buffer("bias", value)
    before = weights(generator)
    content = {"blocks.0.self_attn.q.diff": torch.ones(24, 24), "blocks.1.norm3.diff_b": torch.ones(24)}
    with pytest.raises(CompositionError, match=r"blocks.1.norm2.bias"):
        generator.load_lora(write(tmp_path / "a.safetensors", content))
    assert generator.loras == {} and same(weights(generator), before)


@pytest.mark.parametrize("spec", [3, {"weight": 1.0}, {"path": "a", "scale": 1.0}, [None]])
def test_specifications_that_are_none(spec: Any) -> None:
    with pytest.raises(ConfigError, match="lora"):
        lora_specs(spec)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("a.safetensors", {"path": "a.safetensors"}),
        ("a.safetensors:-0.5", {"path": "a.safetensors", "weight": -0.5}),
        ("transformer_2=a.safetensors:2", {"path": "a.safetensors", "weight": 2.0, "component": "transformer_2"}),
        ("C:/b.safetensors", {"path": "C:/b.safetensors"}),
    ],
)
def test_text_of_a_specification(text: str, spec: dict[str, Any]) -> None:
    assert lora_specs(text) == [spec]
