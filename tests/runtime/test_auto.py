"""`parallel="auto"`: what it takes for which devices and options, and what it says."""

from __future__ import annotations

import argparse
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kinetoscope import VideoGenerator
from kinetoscope.cli import options
from kinetoscope.core.config import Launch
from kinetoscope.core.errors import ConfigError, InputError
from kinetoscope.loading import ModelDir, resolve_model
from kinetoscope.parallel import ParallelConfig
from kinetoscope.runtime import auto, generator
from kinetoscope.runtime.accelerators import ACCELERATORS
from kinetoscope.runtime.auto import accelerator_here, auto_layout, is_auto, refuses
from tiny import make_tiny_wan

VIDEO = "size=64x96,frames=9"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelDir:
    return resolve_model(str(make_tiny_wan(tmp_path_factory.mktemp("m"))))


def layout(model: ModelDir, text: str, **given: Any) -> ParallelConfig:
    return auto_layout(text, model, "cpu", "auto", given)


def test_what_is_auto() -> None:
    assert is_auto("auto") and is_auto("auto:devices=2")
    assert not any(map(is_auto, ("cfg=2", None, {"cfg": 2}, "automatic=2")))


def test_one_device(model: ModelDir, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "kinetoscope"):
        opened = VideoGenerator.from_pretrained(model, device="cpu", parallel="auto")
    assert opened.options["parallel"] is None
    assert "parallel auto: one CPU device, so nothing is shared out" in caplog.messages


def test_several_devices(model: ModelDir, caplog: pytest.LogCaptureFixture) -> None:
    """Rows hardly talk, so they are shared first; an option that keeps them together leaves tokens or copies."""
    with caplog.at_level(logging.INFO, "kinetoscope"):
        assert layout(model, f"auto:{VIDEO},devices=2").cfg == 2
    assert caplog.messages[0].startswith("parallel auto: cfg=2") and "times as long" in caplog.messages[1]
    other = layout(model, f"auto:{VIDEO},devices=2", cfg="sequential", offload="blocks")
    assert other.world == 2 and other.cfg == other.tp == 1 and not other.fsdp
    why = refuses(model, {"offload": "blocks"})(ParallelConfig(tp=2))
    assert why is not None and why.startswith("tp=2 and offload='blocks' cannot be used together")
    assert refuses(model, {})(ParallelConfig(tp=2)) is None


def test_as_many_as_were_started(model: ModelDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "launch", lambda: Launch(1, 4, 1))
    assert layout(model, "auto").world == 4


def test_the_generator_takes_it(model: ModelDir, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[ParallelConfig] = []
    pool = SimpleNamespace(close=lambda: None)
    monkeypatch.setattr(generator, "open_pool", lambda _, config, *rest: taken.append(config) or pool)
    opened = VideoGenerator.from_pretrained(model, device="cpu", parallel=f"auto:{VIDEO},devices=2")
    assert [c.world for c in taken] == [2] and opened.options["parallel"] == {"cfg": 2} | opened.options["parallel"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("auto:sise=64x96", r"unknown setting of parallel=auto 'sise'; did you mean size\?"),
        ("auto:size=64", "size=64 is not HEIGHTxWIDTH"),
        ("auto:devices=0", "devices=0 is not a positive whole number"),
        ("auto:frames=9,devices=two", "devices=two is not"),
        ("auto:devices=2,size=63x96", "63"),
    ],
)
def test_what_is_wrong_is_named(model: ModelDir, text: str, says: str) -> None:
    with pytest.raises((InputError, ConfigError), match=says):
        layout(model, text)


@pytest.mark.parametrize(
    ("name", "tflops", "source"),
    [("NVIDIA H200", ACCELERATORS["h200"].tflops, "H200"), ("NVIDIA L40S", ACCELERATORS["a100"].tflops, "not in the")],
)
def test_gpus_of_this_machine(monkeypatch: pytest.MonkeyPatch, name: str, tflops: float, source: str) -> None:
    found = SimpleNamespace(name=name, total_memory=50e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    here = accelerator_here(torch.device("cuda"))
    assert (here.tflops, here.memory_gb, here.node) == (tflops, 50, 4) and source in here.source


def test_the_command_line_names_the_video() -> None:
    parser = argparse.ArgumentParser()
    options.add_video_options(parser)
    options.add_device_options(parser)
    for line, parallel in (
        ([], None),
        (["--parallel", "cfg=2", "--frames", "9"], "cfg=2"),
        (["--parallel", "auto"], "auto"),
        (["--parallel", "auto", "--size", "64x96", "--frames", "9"], "auto:size=64x96,frames=9"),
        (["--parallel", "auto:devices=2", "--frames", "9"], "auto:devices=2"),
    ):
        assert options.device_fields(parser.parse_args(line))["parallel"] == parallel
