"""Step traces (`engine.hooks.trace`) read again: as rows of a table, and where two of them part ways."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinetoscope.core.errors import InputError
from kinetoscope.core.files import read_text

Record = Mapping[str, Any]

NOT_COMPARED = ("ms", "why", "rows", "cache")
"""Fields that say how fast and in how many forwards, or what a cache looked at, but not what was done."""
_COLUMNS = {
    "step": "step", "block": "block", "timestep": "t", "sigma": "sigma", "rows": "rows", "why": "why",
    "guidance_scale": "w", "cond_norm": "|cond|", "uncond_norm": "|uncond|", "cosine": "cosine", "latent_std": "std",
    "ms": "ms",
}  # fmt: skip
_OPTIONAL = ("block", "uncond_norm", "cosine")
"""Columns that are left out where no step has a value."""


@dataclass(frozen=True, slots=True)
class Parting:
    """The first place where two traces differ by more than the tolerance.

    Attributes:
        index: of the record.
        field: its name; "branches" for the rows that were evaluated, "skipped" for those a step cache left out.
        a, b: both values.
        difference: relative where both are numbers, else None.
    """

    index: int
    field: str
    a: Any
    b: Any
    difference: float | None


def read_trace(path: Path) -> list[Record]:
    """The records of a file that `generate --trace` wrote.

    Raises:
        InputError: it is missing, or no trace.
    """
    try:
        value = json.loads(read_text(path, what="trace"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if isinstance(value, dict):  # `logging_info` as a whole
        value = value.get("step_trace")
    if not isinstance(value, list) or not value or not all(isinstance(r, dict) and "step" in r for r in value):
        raise InputError(f"{path} is no step trace; `kinetoscope generate --trace` writes one beside the video")
    return value


def table_of(trace: Sequence[Record]) -> tuple[list[str], list[list[str]], list[str]]:
    """A trace as text: column titles, one row a step, and lines of what is true of all of it."""
    further = list(dict.fromkeys(k for r in trace for k in r if k not in _COLUMNS))
    names = [k for k in _COLUMNS if k not in _OPTIONAL or any(r.get(k) is not None for r in trace)]
    names += [k for k in further if any(r.get(k) is not None for r in trace)]
    lines: list[str] = []
    reasons = {str(r.get("why") or "") for r in trace}
    if len(reasons) == 1:
        names.remove("why")
        lines += [f"forwards: {why}" for why in reasons if why]
    rows = [[_cell(name, record.get(name)) for name in names] for record in trace]
    return [_COLUMNS.get(n, n.replace("_", " ")) for n in names], rows, [*lines, *_totals(trace)]


def parting(a: Sequence[Record], b: Sequence[Record], tolerance: float) -> Parting | None:
    """Where two traces first differ, step by step and field by field; None: nowhere.

    Numbers may differ by `tolerance` of the larger one (cosines, which are at most 1, by `tolerance` itself). Time, and
    how the rows were put into forwards, are not compared.
    """
    for index in range(max(len(a), len(b))):
        if index >= min(len(a), len(b)):
            return Parting(index, "steps", len(a), len(b), None)
        for field, x, y in _fields(a[index], b[index]):
            found = _difference(x, y, absolute=field == "cosine")
            if found is None or found > tolerance:
                return Parting(index, field, x, y, found)
    return None


def largest_differences(a: Sequence[Record], b: Sequence[Record]) -> dict[str, float]:
    """Field -> its largest relative difference over the steps that both have, of the fields with numbers."""
    found: dict[str, float] = {}
    for first, second in zip(a, b, strict=False):
        for field, x, y in _fields(first, second):
            difference = _difference(x, y, absolute=field == "cosine")
            if difference is not None and x is not None:
                found[field] = max(found.get(field, 0.0), difference)
    return {k: v for k, v in found.items() if k not in ("step", "branches", "skipped")}


def executed_differently(a: Sequence[Record], b: Sequence[Record]) -> bool:
    """Whether the same rows were put into other forwards somewhere."""
    return any(x.get("rows") != y.get("rows") and _branches(x) == _branches(y) for x, y in zip(a, b, strict=False))


def _fields(a: Record, b: Record) -> list[tuple[str, Any, Any]]:
    """What is compared of a step, causes before effects: the order of a record, with the branches after the step."""
    names = list(dict.fromkeys([*a, *b]))
    pairs = [(n, a.get(n), b.get(n)) for n in names if n not in NOT_COMPARED]
    done = [("branches", _branches(a), _branches(b)), ("skipped", _skipped(a), _skipped(b))]
    return [*pairs[:1], *done, *pairs[1:]]


def _branches(record: Record) -> list[str]:
    return [branch for forward in record.get("rows") or [] for branch in forward]


def _skipped(record: Record) -> list[str]:
    """The rows of a step whose blocks a cache left out: "uncond 0"."""
    return [f"{row['branch']} {row['sample']}" for row in record.get("cache") or [] if row.get("skipped")]


def _difference(x: Any, y: Any, *, absolute: bool = False) -> float | None:
    """Relative difference of two numbers, or the largest of two lists; 0 for equal values; None: not to be compared."""
    if _is_number(x) and _is_number(y):
        if x == y or (math.isnan(x) and math.isnan(y)):
            return 0.0
        scale = 1.0 if absolute else max(abs(x), abs(y))
        return abs(x - y) / scale if math.isfinite(x) and math.isfinite(y) else math.inf
    if isinstance(x, list) and isinstance(y, list) and len(x) == len(y):
        parts = [_difference(p, q, absolute=absolute) for p, q in zip(x, y, strict=True)]
        return None if None in parts else max((p for p in parts if p is not None), default=0.0)
    if isinstance(x, dict) and isinstance(y, dict) and x.keys() == y.keys():
        return _difference(list(x.values()), [y[k] for k in x], absolute=absolute)
    return 0.0 if x == y else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(name: str, value: Any) -> str:
    if value is None or value == "":
        return "-"
    if name == "rows":
        return " | ".join("+".join(forward) for forward in value) or "none"
    if name == "cache":
        return " ".join(
            f"{row.get('branch')}{f'.{s}' if (s := row.get('sample')) else ''} "
            f"{'skip' if row.get('skipped') else 'run'} {_cell('', row.get('score'))}"
            for row in value
        )
    if name == "ms":
        return f"{value:.1f}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if _is_number(value):
        return f"{value:.5g}"
    if isinstance(value, list) and value and all(map(_is_number, value)):
        return f"{statistics.fmean(value):.5g}"
    if isinstance(value, dict):
        return " ".join(f"{k}={_cell('', v)}" for k, v in value.items())
    if isinstance(value, list):
        return " ".join(_cell("", v) for v in value)
    return str(value)


def _totals(trace: Sequence[Record]) -> list[str]:
    forwards = sum(len(r.get("rows") or []) for r in trace)
    rows = sum(len(_branches(r)) for r in trace)
    total = sum(r.get("ms") or 0.0 for r in trace)
    samples = max((len(v) for r in trace if isinstance(v := r.get("cond_norm"), list)), default=1)
    lines = [f"{len(trace)} steps, {forwards} forwards of {rows} rows, {total:.1f} ms"]
    if looked := sum(len(r.get("cache") or []) for r in trace):
        lines.append(
            f"the cache skipped {sum(len(_skipped(r)) for r in trace)} of {looked} rows; beside each its score"
        )
    if samples > 1:
        lines.append(f"norms and cosines are means over {samples} samples")
    return lines
