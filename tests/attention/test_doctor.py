"""`kinetoscope doctor` tells of every backend whether it serves, what it keeps exactly, and why not."""

from __future__ import annotations

import pytest
import torch

from kinetoscope.attention import BACKENDS, SPARSE, capabilities
from kinetoscope.cli import main
from kinetoscope.runtime.doctor import attention_backends, examine


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
