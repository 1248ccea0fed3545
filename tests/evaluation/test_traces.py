"""Traces as tables, and the first place where two part ways."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from kinetoscope.cli import main
from kinetoscope.core.errors import InputError
from kinetoscope.evaluation.traces import executed_differently, parting, read_trace, table_of


def record(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step, "block": None, "timestep": 1000.0 - 100 * step, "sigma": 1 - step / 10,
        "rows": [["uncond", "cond"]], "why": "auto: 20 positions", "guidance_scale": 4.0, "cond_norm": [10.0 + step],
        "uncond_norm": [9.0], "cosine": [0.99], "latent_std": 1.0, "ms": 3.0,
    } | more  # fmt: skip


def trace() -> list[dict[str, Any]]:
    return [record(i) for i in range(4)]


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_a_table_has_what_the_steps_have() -> None:
    titles, rows, lines = table_of(trace())
    assert titles == ["step", "t", "sigma", "rows", "w", "|cond|", "|uncond|", "cosine", "std", "ms"]
    assert rows[1] == ["1", "900", "0.9", "uncond+cond", "4", "11", "9", "0.99", "1", "3.0"]
    assert lines == ["forwards: auto: 20 positions", "4 steps, 4 forwards of 8 rows, 12.0 ms"]


def test_what_steps_have_beyond_gets_a_column_of_its_own() -> None:
    """A cache's score; and a step that left its unconditional row out, for another reason."""
    steps = trace()
    steps[2] |= {
        "cache": [{"branch": "cond", "sample": 0, "skipped": True, "score": 0.0312}],
        "note": {"x": True},
        "rows": [["cond"]],
        "why": "gate",
        "uncond_norm": None,
    }
    steps[2]["cond_norm"] = [1.0, 3.0]
    titles, rows, lines = table_of(steps)
    cells = dict(zip(titles, rows[2], strict=True))
    assert (
        cells["cache"] == "cond skip 0.0312"
        and cells["note"] == "x=yes"
        and cells["why"] == "gate"
        and cells["rows"] == "cond"
    )
    assert cells["|uncond|"] == "-" and cells["|cond|"] == "2" and rows[0][titles.index("cache")] == "-"
    assert lines[-2] == "the cache skipped 1 of 1 rows; beside each its score"
    assert lines[-1] == "norms and cosines are means over 2 samples"


def test_equal_traces_do_not_part() -> None:
    other = copy.deepcopy(trace())
    for i, step in enumerate(other):  # another plan, another time, and rounding
        step |= {"rows": [["uncond"], ["cond"]], "ms": 99.0, "why": "asked"}
        step |= {"cache": [{"branch": "cond", "sample": 1, "skipped": False, "score": None}]}  # looked at, not used
        step["cond_norm"] = [step["cond_norm"][0] * (1 + 9e-5 * (-1) ** i)]
    assert parting(trace(), other, 1e-4) is None
    assert executed_differently(trace(), other) and not executed_differently(trace(), trace())
    assert parting(trace(), other, 1e-5) is not None


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"timestep": 801.0}, "timestep"),
        ({"guidance_scale": 4.1}, "guidance_scale"),
        ({"cond_norm": [12.1]}, "cond_norm"),
        ({"cond_norm": [12.0, 12.0]}, "cond_norm"),
        ({"cosine": [0.98]}, "cosine"),
        ({"uncond_norm": None}, "uncond_norm"),
        ({"uncond_norm": [float("nan")]}, "uncond_norm"),
        ({"rows": [["cond"]], "cond_norm": [99.0]}, "branches"),
        ({"cache": [{"branch": "cond", "sample": 0, "skipped": True, "score": 0.1}]}, "skipped"),
        ({"something": 1}, "something"),
    ],
)
def test_the_first_difference_is_found(change: dict[str, Any], field: str) -> None:
    other = trace()
    other[2] |= change
    other[3] |= {"cond_norm": [0.0]}
    found = parting(trace(), other, 1e-4)
    assert found is not None and (found.index, found.field) == (2, field)


def test_a_shorter_trace_parts_where_it_ends() -> None:
    found = parting(trace(), trace()[:3], 1e-4)
    assert found is not None and (found.index, found.field, found.a, found.b) == (3, "steps", 4, 3)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "[1]", '[{"a": 1}]', '"x"'])
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError):
        read_trace(write(tmp_path / "a.json", text))
    with pytest.raises(InputError, match="cannot be read"):
        read_trace(tmp_path / "none.json")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write(tmp_path / "a.json", trace())
    assert main(["explain", str(first)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 1 + 4 + 2 and told[1].split()[:3] == ["0", "1000", "1"]
    assert main(["explain", str(first), str(first)]) == 0
    assert "the same to 0.0001 in all 4 steps" in capsys.readouterr().out
    other = trace()
    other[1]["cond_norm"] = [11.5]
    assert main(["explain", str(first), str(write(tmp_path / "b.json", other))]) == 1
    told = capsys.readouterr().out
    assert "parted at step 1, cond_norm: [11] against [11.5] (differs by 0.043)" in told
    assert main(["explain", str(first), str(first), "--tolerance", "nan"]) == 1
