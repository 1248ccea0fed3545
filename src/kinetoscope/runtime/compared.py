"""What a comparison of two sets of videos gave: numbers, pictures, a verdict, and files that show them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kinetoscope.core.files import write_text
from kinetoscope.evaluation.compare import Comparison, Pair, Thresholds
from kinetoscope.evaluation.metrics import Array
from kinetoscope.evaluation.pictures import SideBySide, side_by_side
from kinetoscope.evaluation.report import SHOWN, html_report

REPORT, PAGE = "report.json", "report.html"


@dataclass(slots=True)
class Compared:
    """What a comparison gave.

    Attributes:
        comparison: numbers.
        pictures: pair name -> pictures, of the least similar pairs.
        thresholds: what B may do at worst.
    """

    comparison: Comparison
    pictures: dict[str, SideBySide] = field(default_factory=dict[str, SideBySide])
    thresholds: Thresholds = field(default_factory=Thresholds)

    @property
    def failures(self) -> list[str]:
        """What speaks against B, one line each."""
        return self.comparison.failures(self.thresholds)

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against B."""
        return not self.failures

    def as_json(self) -> dict[str, Any]:
        """Everything but the pictures, fit for JSON."""
        return self.comparison.as_json(self.thresholds)

    def write(self, folder: str | Path) -> Path:
        """Write `REPORT` (numbers) and `PAGE` (one HTML file with pictures) into a folder; return the page's path.

        Raises:
            OutputError: a file cannot be written.
        """
        files = self.comparison.facts["kind"] == "videos"
        title = "Two sets of videos" if files else "Two configurations"
        write_text(Path(folder) / REPORT, json.dumps(self.as_json(), indent=1, allow_nan=False) + "\n")
        return write_text(Path(folder) / PAGE, html_report(self.comparison, self.thresholds, self.pictures, title))

    def add(self, pair: Pair, a: Array, b: Array, fps: float) -> None:
        """Take in a pair with scores, and its pictures if it is among the worst."""
        assert pair.scores is not None
        self.comparison.pairs.append(pair)
        self.pictures[pair.name] = side_by_side(a, b, pair.scores.ssim, fps)
        if len(self.pictures) > SHOWN:
            kept = {p.name: p.scores.error for p in self.comparison.pairs if p.scores and p.name in self.pictures}
            del self.pictures[min(kept, key=lambda name: kept[name])]
