"""Does the video show what the prompt says? Scored by a world's own judge."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kinetoscope.core.errors import InputError

ALL = "all correct"
Z95 = 1.959964  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True, slots=True)
class Score:
    """A share of correct answers with its 95 % interval (Wilson 1927)."""

    correct: int
    total: int

    @property
    def value(self) -> float:
        """The share."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper bound."""
        p, n, z2 = self.value, self.total, Z95 * Z95
        middle = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)


Report = dict[str, Score]
"""Attribute, and `ALL`, -> score."""
Reports = dict[str, "Report | None"]
"""What was scored -> its report; None: there is none (`baselines`)."""


def prompt_following(world: Any, items: Iterable[tuple[Any, np.ndarray[Any, Any]]]) -> Report:
    """Score (spec, frames) pairs: frames uint8 [T, H, W, 3].

    Raises:
        InputError: there are no items.
    """
    right: dict[str, list[bool]] = {name: [] for name in (*world.attributes, ALL)}
    for spec, frames in items:
        seen = world.judge(frames)
        hits = {name: seen[name] == value for name, value in spec.attributes().items()}
        for name, hit in (hits | {ALL: all(hits.values())}).items():
            right[name].append(hit)
    if not right[ALL]:
        raise InputError("there is nothing to score")
    return {name: Score(sum(hits), len(hits)) for name, hits in right.items()}


def heldout_specs(world: Any, count: int, seed: int = 0) -> list[Any]:
    """`count` specs whose captions were never trained on: each once in a random order, then again from the start."""
    specs = world.captions("heldout")
    order = np.random.default_rng(seed).permutation(len(specs))
    return [specs[order[i % len(order)]] for i in range(count)]


def baselines(world: Any, specs: Sequence[Any], seed: int = 0, **size: int) -> Reports:
    """Score the world's own clips, under their own captions and under those of others.

    Args:
        size: of the clips, for the renderer.

    Returns:
        "ground truth": the clips under their own captions, near 1. "shuffled captions": each under the caption of
        another spec, which is chance; None where the specs cannot be shuffled so (`other_captions`).
    """
    clips = [world.render(spec, seed + i, **size) for i, spec in enumerate(specs)]
    others = other_captions(specs, seed)
    return {
        "ground truth": prompt_following(world, zip(specs, clips, strict=True)),
        "shuffled captions": None
        if others is None
        else prompt_following(world, ((specs[j], c) for j, c in zip(others, clips, strict=True))),
    }


def other_captions(specs: Sequence[Any], seed: int = 0) -> list[int] | None:
    """Return an order of specs in which none is where an equal one was: a random one, in which equal pairs are swapped
    with others. None where there is none, since more than half of the specs are equal (one alone is all of them)."""
    random = np.random.default_rng(seed)
    told = [tuple(spec.attributes().items()) for spec in specs]
    if not told or 2 * max(Counter(told).values()) > len(told):
        return None
    order: list[int] = random.permutation(len(specs)).tolist()
    for i in range(len(order)):
        if told[order[i]] != told[i]:
            continue
        allowed = [j for j in range(len(order)) if told[i] not in (told[j], told[order[j]])]
        j = int(random.choice(allowed))  # there is one, where no spec is more than half of all
        order[i], order[j] = order[j], order[i]
    return order


def as_json(report: Report | None) -> dict[str, Any] | None:
    """Return the report as plain numbers; None where there is none."""
    if report is None:
        return None
    return {
        name: {"value": s.value, "low": s.interval[0], "high": s.interval[1], "correct": s.correct, "n": s.total}
        for name, s in report.items()
    }


def as_table(reports: Mapping[str, Report | None]) -> str:
    """Return reports side by side as a Markdown table, one row an attribute; "n/a" where there is none."""
    names = list(dict.fromkeys(name for r in reports.values() if r is not None for name in r))
    lines = [f"| | {' | '.join(reports)} |", "|---" * (len(reports) + 1) + "|"]
    for name in names:
        cells = [
            "n/a" if r is None else f"{r[name].value:.3f} [{r[name].interval[0]:.3f}, {r[name].interval[1]:.3f}]"
            for r in reports.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
