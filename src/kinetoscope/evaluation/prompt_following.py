"""Does the video show what the prompt says? Scored by a world's own judge."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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


def baselines(world: Any, specs: Sequence[Any], seed: int = 0, **size: int) -> dict[str, Report]:
    """The judge on the world's own clips ("ground truth", near 1), and on the same clips under shuffled captions
    ("shuffled captions", chance). `size` goes to the renderer."""
    clips = [world.render(spec, seed + i, **size) for i, spec in enumerate(specs)]
    shuffled = np.random.default_rng(seed).permutation(len(specs))
    return {
        "ground truth": prompt_following(world, zip(specs, clips, strict=True)),
        "shuffled captions": prompt_following(
            world, ((specs[int(j)], c) for j, c in zip(shuffled, clips, strict=True))
        ),
    }


def as_json(report: Report) -> dict[str, Any]:
    """The report as plain numbers."""
    return {
        name: {"value": s.value, "low": s.interval[0], "high": s.interval[1], "correct": s.correct, "n": s.total}
        for name, s in report.items()
    }


def as_table(reports: dict[str, Report]) -> str:
    """Reports side by side as a Markdown table, one row an attribute."""
    names = list(next(iter(reports.values())))
    lines = [f"| | {' | '.join(reports)} |", "|---" * (len(reports) + 1) + "|"]
    for name in names:
        cells = [
            f"{r[name].value:.3f} [{r[name].interval[0]:.3f}, {r[name].interval[1]:.3f}]" for r in reports.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
