"""Does a long video stay what it was? What its blocks show, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinetoscope.core.errors import ConfigError, InputError
from kinetoscope.core.files import replacing
from kinetoscope.evaluation.prompt_following import ALL, Score

Span = tuple[int, int]
"""Consecutive frames [start, stop)."""
Scores = dict[str, list[Score]]
"""Attribute, and all of them together -> score of each block."""

READABLE = 0.9
"""Share of the world's own blocks in which the judge must read an attribute, for it to be asked of a model's: a motion
is not seen in every block, a colour is."""


@dataclass(frozen=True, slots=True)
class Drift:
    """Scores block by block.

    Attributes:
        spans: frames of each block.
        model, truth: of the videos, and of the world's own clips of the same specs.
    """

    spans: list[Span]
    model: Scores
    truth: Scores


def block_spans(frames: int, size: int) -> list[Span]:
    """A video cut into blocks of `size` frames; what is left over is the first one, as in causal models.

    Raises:
        InputError: fewer than two blocks.
    """
    if size < 1 or frames <= size:
        raise InputError(f"{frames} frames are no two blocks of {size}; ask for more frames, or for smaller blocks")
    first = frames % size
    return [(0, first)][: bool(first)] + [(start, start + size) for start in range(first, frames, size)]


def measure_drift(world: Any, specs: Sequence[Any], videos: Sequence[Any], size: int, seed: int = 0) -> Drift:
    """Judge every block by itself, in what is seen in blocks that short.

    Args:
        videos: uint8 [T, H, W, 3], one a spec.
        size: frames of a block.
        seed: of the first of the world's clips.

    Raises:
        InputError: see `block_spans`; or nothing can be read in blocks that short.
    """
    frames, height, width = videos[0].shape[:3]
    spans = block_spans(frames, size)
    truth = [world.render(s, seed + i, height=height, width=width, num_frames=frames) for i, s in enumerate(specs)]
    hits = {name: _hits(world, specs, shown, spans) for name, shown in (("model", videos), ("truth", truth))}
    blocks = [block for video in hits["truth"] for block in video]
    readable = [n for n in world.attributes if sum(b[n] for b in blocks) >= READABLE * len(blocks)]
    if not readable:
        raise InputError(f"nothing can be read in blocks of {size} frames; use longer ones")
    return Drift(spans, _scores(hits["model"], readable), _scores(hits["truth"], readable))


def _hits(
    world: Any, specs: Sequence[Any], videos: Sequence[Any], spans: Sequence[Span]
) -> list[list[dict[str, bool]]]:
    """Video by video, block by block: which attributes are as the spec says."""
    found: list[list[dict[str, bool]]] = []
    for spec, video in zip(specs, videos, strict=True):
        seen = [world.judge(video[start:stop]) for start, stop in spans]
        found.append([{n: block[n] == value for n, value in spec.attributes().items()} for block in seen])
    return found


def _scores(hits: list[list[dict[str, bool]]], names: Sequence[str]) -> Scores:
    def score(index: int, wanted: Sequence[str]) -> Score:
        return Score(sum(all(video[index][n] for n in wanted) for video in hits), len(hits))

    columns = {n: [n] for n in names} | {ALL: list(names)}
    return {name: [score(i, wanted) for i in range(len(hits[0]))] for name, wanted in columns.items()}


def drift_json(drift: Drift) -> dict[str, Any]:
    """As plain numbers."""
    shares = {k: {n: [s.value for s in row] for n, row in part.items()} for k, part in _parts(drift).items()}
    return {"spans": [list(span) for span in drift.spans], **shares}


def drift_table(drift: Drift) -> str:
    """The first, the last and the worst block as a Markdown table, one row an attribute."""
    first, last = (f"frames {a}-{b - 1}" for a, b in (drift.spans[0], drift.spans[-1]))
    lines = [f"| | {first} | {last} | worst block | ground truth, worst |", "|---|---|---|---|---|"]
    for name, row in drift.model.items():
        shown = [row[0], row[-1], min(row, key=lambda s: s.value), min(drift.truth[name], key=lambda s: s.value)]
        lines.append(f"| {name} | {' | '.join(f'{s.value:.3f}' for s in shown)} |")
    return "\n".join(lines)


def draw_drift(drift: Drift, path: Path) -> None:
    """Scores over time, with their 95 % intervals, and those of the world's own clips dashed (PNG).

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("a plot of drift needs matplotlib: pip install kinetoscope[train]") from error
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axis: Any = figure.subplots()
    middle = [(start + stop - 1) / 2 for start, stop in drift.spans]
    for name, row in drift.model.items():
        (line,) = axis.plot(middle, [s.value for s in row], label=name, linewidth=2 if name == ALL else 1)
        axis.plot(middle, [s.value for s in drift.truth[name]], "--", color=line.get_color(), linewidth=0.7)
        if name == ALL:
            axis.fill_between(middle, *zip(*(s.interval for s in row), strict=True), color=line.get_color(), alpha=0.15)
    axis.set(xlabel="frame", ylabel="share that is right", ylim=(0, 1.02))
    axis.legend(fontsize="small", loc="lower left")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=80)


def _parts(drift: Drift) -> dict[str, Scores]:
    return {"model": drift.model, "ground truth": drift.truth}
