"""`kinetoscope doctor` tells of every backend whether it serves, what it keeps exactly, and why not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kinetoscope import VideoGenerator
from kinetoscope.attention import BACKENDS, SPARSE, AttentionTable, capabilities
from kinetoscope.cli import main
from kinetoscope.core.config import settings
from kinetoscope.runtime.doctor import attention_backends, examine
from tiny import make_tiny_wan


def test_every_backend_is_told_of() -> None:
    table = examine("cpu")["attention"]["float32"]
    told = table["backends"]
    assert list(told) == [*BACKENDS, *SPARSE]
    assert {name for name, facts in told.items() if facts["serves"] == "no"} == set(table["refused"])
    assert {name for name, facts in told.items() if facts["exactness"] == "lossy"} == {"sage2", "sage3", *SPARSE}
    assert all(facts["why"] for facts in told.values() if facts["serves"] != "yes" or facts["exactness"] == "lossy")


def test_what_drops_a_key_bias_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    told = attention_backends(capabilities("cuda", torch.bfloat16))
    assert told["sdpa:flash"] == {
        "serves": "without key bias", "exactness": "exact", "why": "torch's flash kernel takes no mask on CUDA"
    }  # fmt: skip
    assert told["sdpa:efficient"]["serves"] == "yes"


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    for name in (*BACKENDS, *SPARSE):
        assert f"\n  {name} " in printed


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The process with `KINETOSCOPE_ATTENTION=self=math`."""
    settings.cache_clear()
    monkeypatch.setenv("KINETOSCOPE_ATTENTION", "self=math")
    yield monkeypatch
    settings.cache_clear()


def test_attention_of_the_environment_serves_unless_a_caller_names_another(
    setting: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_tiny_wan(tmp_path / "wan")

    def chosen(**options: Any) -> list[str]:
        table = VideoGenerator.from_pretrained(path, device="cpu", **options).pipeline.args.attention
        assert isinstance(table, AttentionTable)
        return [table.choices[role].backend for role in ("self", "cross")]

    auto = capabilities("cpu", torch.float32).preferred
    assert chosen() == ["math", auto]
    assert chosen(attention="auto") == [auto, auto]
    assert chosen(attention={"cross": "math"}) == [auto, "math"]
    capsys.readouterr()
    assert main(["info", str(path), "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["options"]["attention"] == "self=math"
    assert main(["info", str(path), "--json", "--device", "cpu", "--attention", "auto"]) == 0
    assert json.loads(capsys.readouterr().out)["options"]["attention"] == "auto"


def test_doctor_says_whether_the_attention_of_the_environment_serves(
    setting: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--device", "cpu"]) == 0
    assert "KINETOSCOPE_ATTENTION=self=math: serves" in capsys.readouterr().out
    settings.cache_clear()
    setting.setenv("KINETOSCOPE_ATTENTION", "mth")
    assert main(["doctor", "--device", "cpu"]) == 0
    assert re.search("ATTENTION=mth: cannot serve: .*did you mean math", capsys.readouterr().out)
