"""Every pair of settings matches its oracle or is refused at start, naming both."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kinetoscope import VideoGenerator
from kinetoscope.core.errors import CompositionError, ConfigError
from kinetoscope.engine.hooks.caches import FBCache, TaylorSeer
from kinetoscope.nn import compile as compile_module
from kinetoscope.runtime import care
from kinetoscope.runtime.composition import CONFLICTS, SETTINGS, Setting, check_pairs
from kinetoscope.runtime.settings import parse_configuration
from tiny import make_tiny_wan

REQUEST: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 9, "fps": 8, "num_inference_steps": 4, "seed": 3}
PROMPT, OTHER = "a red circle", "a small white square moving left on black"


class Bench:
    """A tiny model, and the latents that settings give on it, each computed once."""

    def __init__(self, folder: Path) -> None:
        self.model = make_tiny_wan(folder / "wan", layers=3)
        self.lora = folder / "style.safetensors"
        draw = torch.Generator().manual_seed(0)
        save_file({f"transformer.blocks.{i}.attn1.to_{n}.lora_{side}.weight": 0.3 * torch.randn(shape, generator=draw)
                   for i in range(3) for n in "qv" for side, shape in (("A", (2, 24)), ("B", (24, 2)))},
                  self.lora)  # fmt: skip
        self.known: dict[tuple[str, ...], torch.Tensor] = {}

    def result(self, *texts: str, prompts: Any = PROMPT) -> Any:
        """What the settings make."""
        asked = parse_configuration(",".join(texts).format(lora=self.lora))
        generator = VideoGenerator.from_pretrained(self.model, device="cpu", **asked.options)
        return generator.generate_video(prompts, **{**REQUEST, **asked.fields})

    def latents(self, *texts: str) -> torch.Tensor:
        key = tuple(sorted(texts))
        if key not in self.known:
            self.known[key] = self.result(*texts).latents
        return self.known[key]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("composition"))


@pytest.fixture(autouse=True)
def traced_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks are traced, and no code is generated for them: that takes a minute a pair."""
    torch._dynamo.reset()
    original = compile_module.compile_blocks
    monkeypatch.setattr(care, "compile_blocks", lambda part, mode: original(part, mode, "eager"))
    monkeypatch.setattr(compile_module, "missing_compiler", lambda device: None)
    yield
    torch._dynamo.reset()


def close(got: torch.Tensor, expected: torch.Tensor, texts: tuple[str, ...]) -> bool:
    """Within rounding, which is coarser in half precision."""
    share = 8e-2 if any("bfloat16" in t for t in texts) else 1e-4
    return bool((got - expected).abs().max() <= share * expected.std())


LOSSY = [s for s in SETTINGS if not s.exact and s.name != "vae"]
"""Tiles change frames larger than a tile, and no latents: tests/runtime/test_vae_modes.py."""


@pytest.mark.parametrize("setting", LOSSY, ids=lambda s: s.text)
def test_lossy_settings_do_something(bench: Bench, setting: Setting) -> None:
    assert not torch.equal(bench.latents(setting.text), bench.latents())


@pytest.mark.parametrize("first", SETTINGS, ids=lambda s: s.text)
def test_every_pair(bench: Bench, first: Setting) -> None:
    for second in SETTINGS[SETTINGS.index(first) + 1 :]:
        pair = (first.text, second.text)
        if first.name == second.name:
            with pytest.raises(ConfigError, match=first.name):
                bench.result(*pair)
            continue
        got = bench.latents(*pair)
        if first.exact or second.exact:
            alone = second.text if first.exact else first.text
            assert close(got, bench.latents(alone), pair), pair
            continue
        if "cfg" not in (first.name, second.name):
            assert close(got, bench.latents(*pair, "cfg=sequential"), pair), pair
        for one in (first, second):
            if "vae=tiled" not in pair:
                assert not torch.equal(got, bench.latents(one.text)), f"{pair}: as if {one.text} were all"


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.text)
def test_a_list_of_prompts_under_every_setting(bench: Bench, setting: Setting) -> None:
    together = bench.result(setting.text, prompts=[PROMPT, OTHER])
    assert close(together[0].latents, bench.latents(setting.text), (setting.text,))


def test_batched_guidance_lora_a_cache_and_compile_at_once(bench: Bench) -> None:
    """Any of the four, and all: the same as lossy ones of them with a forward a row and nothing compiled."""
    four = ("cfg=batched", "lora={lora}", "cache=fbcache:threshold=0.9", "compile=true")
    for count in (2, 3, 4):
        for chosen in itertools.combinations(four, count):
            lossy = [t for t in chosen if t.startswith(("lora", "cache"))]
            assert close(bench.latents(*chosen), bench.latents(*lossy, "cfg=sequential"), chosen), chosen
    cached = bench.result(*four)
    assert cached.logging_info["step_cache"]["skipped"] > 0


VALUES: dict[str, Any] = {
    "quantize": "int8", "autocast": True, "offload": "blocks", "vae": "tiled", "compile": "max-autotune"
}  # fmt: skip


@pytest.mark.parametrize("conflict", CONFLICTS, ids=lambda c: f"{c.first} {c.second}")
def test_declared_conflicts_are_refused_when_the_model_is_opened(bench: Bench, conflict: Any) -> None:
    first, second = conflict.first.partition("=")[0], conflict.second.partition("=")[0]
    values: dict[str, Any] = {first: VALUES[first]}
    if second == "modules":
        donor = VideoGenerator.from_pretrained(bench.model, device="cpu")
        donor.pipeline.get_module("transformer"), donor.pipeline.get_module("vae")
        values["modules"] = donor.pipeline.loaded_modules()
    else:
        values[second] = VALUES[second]
    with pytest.raises(CompositionError, match="cannot be used together") as caught:
        VideoGenerator.from_pretrained(bench.model, device="cpu", **values)
    assert f"{first}=" in str(caught.value) and f"{second}=" in str(caught.value)
    for alone in (first, second):
        check_pairs({alone: values[alone]})


def test_two_caches_are_refused(bench: Bench) -> None:
    with pytest.raises(CompositionError, match=r"taylorseer.*fbcache|fbcache.*taylorseer"):
        VideoGenerator.from_pretrained(bench.model, device="cpu", cache="taylorseer", hooks=[FBCache()])
    with pytest.raises(CompositionError, match="twice"):
        VideoGenerator.from_pretrained(bench.model, device="cpu", hooks=[TaylorSeer(), TaylorSeer()])


def test_the_page_is_what_the_code_declares() -> None:
    file = Path(__file__).parents[2] / "docs" / "composition.py"
    spec = importlib.util.spec_from_file_location("composition_page", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.FILE.read_text(encoding="utf-8") == module.page(), "run python docs/composition.py"
