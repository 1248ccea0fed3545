"""Two sets of videos side by side: scores of each pair, their summary, and a verdict."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from kinetoscope.core.errors import ConfigError
from kinetoscope.evaluation.flicker import flicker
from kinetoscope.evaluation.metrics import Array, Distance, psnr, squared_error
from kinetoscope.evaluation.prompt_following import Score
from kinetoscope.evaluation.ssim import similarity

SIDES = ("a", "b")
DEFAULT_MIN_SSIM = 0.95


@dataclass(frozen=True, slots=True)
class VideoScores:
    """One video against another of the same size and length.

    Attributes:
        ssim: of each frame; None for frames smaller than 11 pixels.
        ms_ssim: mean over frames, with `scales` scales; None likewise.
        error: mean squared difference, in grey levels squared.
        largest: largest difference of a pixel, in grey levels.
        flicker: of both (`evaluation.flicker`); None with fewer than three frames.
        lpips: where it is installed.
    """

    ssim: tuple[float, ...] | None
    ms_ssim: float | None
    scales: int
    error: float
    largest: int
    flicker: tuple[float, float] | None
    lpips: float | None = None

    @property
    def mean_ssim(self) -> float | None:
        """Mean over the frames."""
        return None if self.ssim is None else statistics.fmean(self.ssim)

    @property
    def psnr(self) -> float:
        """In dB, of all frames together; infinite for equal videos."""
        return psnr(self.error)


def compare_videos(a: Array, b: Array, lpips: Distance | None = None) -> VideoScores:
    """Scores of `b` against `a`, uint8 [T, H, W, 3] each.

    Raises:
        InputError: the arrays are no videos, or differ in frames or size.
    """
    alike = similarity(a, b)
    return VideoScores(
        ssim=None if alike.ssim is None else tuple(map(float, alike.ssim)),
        ms_ssim=None if alike.ms_ssim is None else float(alike.ms_ssim.mean()),
        scales=alike.scales,
        error=squared_error(a, b),
        largest=max(int(abs(x.astype(int) - y).max()) for x, y in zip(a, b, strict=True)),
        flicker=(flicker(a), flicker(b)) if len(a) >= 3 else None,
        lpips=None if lpips is None else lpips(a, b),
    )


@dataclass(slots=True)
class Pair:
    """One video of each side.

    Attributes:
        name: of the pair: "prompt, seed", or a file.
        scores: None where the two cannot be compared; `problem` says why.
        latents: largest and root-mean-square difference of the samples, in standard deviations of the first.
        runs: (stage -> seconds of A, of B), one for each time both were run one after the other.
        peaks: largest memory use of A and of B in bytes.
        judged: of A and of B: attribute that the prompt names -> whether the video shows it.
        facts: what else identifies it (prompt, seed, files).
    """

    name: str
    scores: VideoScores | None = None
    problem: str = ""
    latents: tuple[float, float] | None = None
    runs: list[tuple[dict[str, float], dict[str, float]]] = field(
        default_factory=list[tuple[dict[str, float], dict[str, float]]]
    )
    peaks: tuple[int, int] | None = None
    judged: tuple[dict[str, bool], dict[str, bool]] | None = None
    facts: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What B may do at worst. None: not asked; if nothing is asked, SSIM is, at 0.95.

    Attributes:
        min_ssim: SSIM of every video (mean over its frames).
        min_ms_ssim: multi-scale SSIM of every video.
        min_psnr: PSNR of every video, in dB.
        max_lpips: LPIPS of every video.
        max_latent_diff: largest difference of the latents, in their standard deviations.
        max_flicker_rise: flicker of B minus that of A in any video, in grey levels.
        max_score_drop: share of the prompts' attributes shown by A, minus the share shown by B.
        max_slowdown: wall time of B over that of A, median over alternating pairs.
        max_memory: peak memory of B over that of A.
    """

    min_ssim: float | None = None
    min_ms_ssim: float | None = None
    min_psnr: float | None = None
    max_lpips: float | None = None
    max_latent_diff: float | None = None
    max_flicker_rise: float | None = None
    max_score_drop: float | None = None
    max_slowdown: float | None = None
    max_memory: float | None = None

    def asked(self) -> dict[str, float]:
        """Threshold -> value, of those that count.

        Raises:
            ConfigError: one is not a number.
        """
        given = {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}
        for name, value in given.items():
            if not math.isfinite(value):
                raise ConfigError(f"{name}={value} is not a finite number")
        return given or {"min_ssim": DEFAULT_MIN_SSIM}


@dataclass(slots=True)
class Comparison:
    """The pairs, and what they say together.

    Attributes:
        labels: what A and B are.
        pairs: of videos.
        facts: where and of what they were made, fit for JSON.
        notes: what could not be measured, and why.
    """

    labels: tuple[str, str]
    pairs: list[Pair]
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    notes: list[str] = field(default_factory=list[str])

    @property
    def scored(self) -> list[VideoScores]:
        """Scores of the pairs that could be compared."""
        return [p.scores for p in self.pairs if p.scores is not None]

    def measures(self) -> dict[str, dict[str, float]]:
        """Measure -> {"mean", "worst"} over the videos, of what could be measured; PSNR may be infinite."""
        scores = self.scored
        found = {
            "ssim": _spread(min, (s.mean_ssim for s in scores)),
            "ms_ssim": _spread(min, (s.ms_ssim for s in scores)),
            "psnr": _spread(min, (s.psnr for s in scores)),
            "lpips": _spread(max, (s.lpips for s in scores)),
            "largest_difference": _spread(max, (s.largest for s in scores)),
            "latent_difference": _spread(max, (p.latents[0] if p.latents else None for p in self.pairs)),
            "flicker_rise": _spread(max, (s.flicker[1] - s.flicker[0] if s.flicker else None for s in scores)),
        }
        if found["psnr"]:  # a mean of decibels says little, and one equal pair would make it infinite
            found["psnr"]["mean"] = psnr(statistics.fmean(s.error for s in scores))
        return {name: value for name, value in found.items() if value}

    def time(self) -> dict[str, dict[str, float]]:
        """Stage, and "total", -> {"a", "b"} median seconds and "ratio", the median over pairs of B / A."""
        runs = [r for p in self.pairs for r in p.runs]
        stages = list(dict.fromkeys(s for run in runs for side in run for s in side))
        table = {s: [(a.get(s, 0.0), b.get(s, 0.0)) for a, b in runs] for s in stages}
        if runs:
            table["total"] = [(sum(a.values()), sum(b.values())) for a, b in runs]
        return {
            stage: {
                "a": statistics.median(a for a, _ in taken),
                "b": statistics.median(b for _, b in taken),
                "ratio": statistics.median(b / a if a > 0 else 1.0 for a, b in taken),
            }
            for stage, taken in table.items()
        }

    def memory(self) -> dict[str, float] | None:
        """Largest peak of A and of B in bytes, and their "ratio"."""
        peaks = [p.peaks for p in self.pairs if p.peaks]
        if not peaks:
            return None
        a, b = (max(p[i] for p in peaks) for i in (0, 1))
        return {"a": a, "b": b, "ratio": b / a if a else 1.0}

    def following(self) -> tuple[Score, Score] | None:
        """Of the attributes that the prompts name: how many A and B show."""
        judged = [p.judged for p in self.pairs if p.judged and p.judged[0]]
        if not judged:
            return None
        hits = [[hit for pair in judged for hit in pair[i].values()] for i in (0, 1)]
        return Score(sum(hits[0]), len(hits[0])), Score(sum(hits[1]), len(hits[1]))

    def failures(self, thresholds: Thresholds) -> list[str]:
        """What speaks against B, one line each; none: it passes."""
        lines = [f"{p.name}: {p.problem}" for p in self.pairs if p.problem]
        values = self._worst()
        for name, limit in thresholds.asked().items():
            kind, _, measure = name.partition("_")
            value = values.get(measure)
            if value is None:
                lines.append(f"--{name.replace('_', '-')} {limit:g}: nothing to measure it on{self._why(measure)}")
            elif (value < limit) if kind == "min" else (value > limit):
                word = "below" if kind == "min" else "above"
                digits = 8 if "ssim" in measure else 4  # values near 1
                lines.append(f"{NAMES[measure]} {value:.{digits}g} is {word} {limit:.{digits}g}")
        return lines

    def _worst(self) -> dict[str, float]:
        """Threshold without min or max -> the value it is held against."""
        found = {name: m["worst"] for name, m in self.measures().items()}
        if "latent_difference" in found:
            found["latent_diff"] = found.pop("latent_difference")
        if time := self.time():
            found["slowdown"] = time["total"]["ratio"]
        if memory := self.memory():
            found["memory"] = memory["ratio"]
        if following := self.following():
            found["score_drop"] = following[0].value - following[1].value
        return found

    def _why(self, measure: str) -> str:
        if measure in ("ssim", "ms_ssim") and self.scored:
            return " (frames are smaller than its window of 11 pixels; use --min-psnr)"
        return ""

    def as_json(self, thresholds: Thresholds) -> dict[str, Any]:
        """Everything as plain values; what is infinite is None (PSNR of equal videos)."""
        failures = self.failures(thresholds)
        following = self.following()
        return finite(
            {
                "format": 1,
                "verdict": "fail" if failures else "pass",
                "failures": failures,
                "thresholds": thresholds.asked(),
                "a": self.labels[0],
                "b": self.labels[1],
                **self.facts,
                "measures": self.measures(),
                "seconds": self.time(),
                "peak_memory": self.memory(),
                "prompt_following": following
                and {
                    side: {"value": s.value, "correct": s.correct, "n": s.total}
                    for side, s in zip(SIDES, following, strict=True)
                },
                "notes": self.notes,
                "pairs": [_pair_json(p) for p in self.pairs],
            }
        )


NAMES = {
    "ssim": "SSIM",
    "ms_ssim": "MS-SSIM",
    "psnr": "PSNR",
    "lpips": "LPIPS",
    "largest_difference": "largest pixel difference",
    "latent_difference": "largest latent difference",
    "latent_diff": "largest latent difference",
    "flicker_rise": "rise of flicker",
    "score_drop": "drop of prompt following",
    "slowdown": "slowdown",
    "memory": "memory ratio",
}
"""Measure -> words."""


def finite(value: Any) -> Any:
    """`value` with every number that JSON does not know (infinite, not a number) as None."""
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _spread(worst: Any, values: Iterable[float | None]) -> dict[str, float]:
    known = [v for v in values if v is not None]
    return {"mean": statistics.fmean(known), "worst": worst(known)} if known else {}


def _pair_json(pair: Pair) -> dict[str, Any]:
    s = pair.scores
    measured = s and {
        "identical": s.error == 0,
        "ssim": s.mean_ssim,
        "ssim_frames": s.ssim,
        "ms_ssim": s.ms_ssim,
        "ms_ssim_scales": s.scales,
        "psnr": s.psnr,
        "largest_difference": s.largest,
        "lpips": s.lpips,
        "flicker": _by_side(s.flicker),
    }
    return {
        "name": pair.name,
        **pair.facts,
        "problem": pair.problem or None,
        **(measured or {}),
        "latent_difference": pair.latents and {"max": pair.latents[0], "rms": pair.latents[1]},
        "seconds": [_by_side(r) for r in pair.runs],
        "peak_memory": _by_side(pair.peaks),
        "judged": _by_side(pair.judged),
    }


def _by_side(values: Sequence[Any] | None) -> dict[str, Any] | None:
    return None if values is None else dict(zip(SIDES, values, strict=True))
