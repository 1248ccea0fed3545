"""Settings, context, version, and a package that imports quickly."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

import pytest

from kinetoscope.core.config import Settings, read_settings
from kinetoscope.core.context import ForwardContext, current_context, forward_context
from kinetoscope.core.errors import CompositionError, ConfigError
from kinetoscope.core.stage_data import StageData
from kinetoscope.core.types import ForwardBatch, SamplingParams
from kinetoscope.core.version import __version__


def test_settings_are_switches() -> None:
    assert read_settings({}) == Settings(denoising_perf_logging=False, offline=False)
    assert read_settings({"KINETOSCOPE_DENOISING_PERF_LOGGING": "1"}).denoising_perf_logging
    assert not read_settings({"KINETOSCOPE_OFFLINE": "off"}).offline
    with pytest.raises(ConfigError, match="KINETOSCOPE_OFFLINE='maybe'"):
        read_settings({"KINETOSCOPE_OFFLINE": "maybe"})
    assert read_settings({"KINETOSCOPE_ATTENTION": "self=math"}).attention == "self=math"
    assert read_settings({"KINETOSCOPE_ATTENTION": " "}).attention == "auto"
    with pytest.raises(ConfigError, match=r"unknown environment variable.*did you mean KINETOSCOPE_OFFLINE"):
        read_settings({"KINETOSCOPE_OFLINE": "1"})


def test_contexts_nest_and_close_on_errors() -> None:
    outer, inner = ForwardContext(), ForwardContext()
    assert current_context() is None
    with pytest.raises(ValueError, match="out"), forward_context(outer):
        with forward_context(inner):
            assert current_context() is inner
        assert current_context() is outer
        raise ValueError("out")
    assert current_context() is None


def test_sampling_params_lie_over_defaults() -> None:
    defaults = SamplingParams(height=64, width=64, guidance_scale=4.0)
    assert SamplingParams(width=32, guidance_scale=1.0).over(defaults) == SamplingParams(64, 32, guidance_scale=1.0)


def test_the_version_is_that_of_the_distribution() -> None:
    assert metadata.version("kinetoscope") == __version__


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, kinetoscope, kinetoscope.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_ratchets() -> None:
    """What grows without anybody deciding it: files, and the batch that all stages share."""
    from dataclasses import fields
    from pathlib import Path

    assert len(fields(ForwardBatch)) <= 30
    root = Path(__file__).parents[2] / "src"
    long = {p.name: n for p in root.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert not long


@dataclass
class Words:
    """An object with a part for each sample."""

    words: list[str]

    def rows(self, start: int, stop: int) -> Words:
        return Words(self.words[start:stop])

    def joined(self, others: Sequence[Words]) -> Words:
        return Words([w for part in (self, *others) for w in part.words])


@dataclass
class Table:
    """An object that all samples share."""

    rows_of_it: int


def test_stage_data_is_split_and_joined_with_its_samples() -> None:
    batch = ForwardBatch(SamplingParams(), ["a", "b", "c"], [""] * 3, [0] * 3)
    table = Table(3)
    batch.data.put(Words(["x", "y", "z"]))
    batch.data.put(table)
    parts = batch.samples()
    assert [p.data.get(Words).words for p in parts] == [["x"], ["y"], ["z"]]
    assert all(p.data.get(Table) is table for p in parts)
    parts[1].data.put(Words(["changed"]))
    whole = ForwardBatch.joined(parts)
    assert whole.data.get(Words).words == ["x", "changed", "z"] and whole.data.get(Table) is table
    assert batch.data.get(Words).words == ["x", "y", "z"]


def test_stage_data_names_what_is_missing() -> None:
    data = StageData()
    with pytest.raises(CompositionError, match=r"holds no Words, but nothing"):
        data.get(Words)
    data.put(Table(1))
    assert data.find(Words) is None and Words not in data and Table in data
    with pytest.raises(CompositionError, match=r"holds no Words, but Table"):
        data.get(Words)
