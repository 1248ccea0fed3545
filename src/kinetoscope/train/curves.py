"""Loss curves as a picture."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

from kinetoscope.core.errors import ConfigError
from kinetoscope.core.files import replacing


def check_matplotlib() -> None:
    """Check that curves can be drawn, which a training does when it is over.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError("loss curves need matplotlib, which is not installed: pip install kinetoscope[train]")


def draw_curves(logs: Path, path: Path) -> None:
    """One panel for each `*.jsonl` log of a folder, written to `path` (PNG).

    Raises:
        ConfigError: matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    files = sorted(logs.glob("*.jsonl"))
    figure = Figure(figsize=(4 * max(len(files), 1), 3), layout="constrained")
    for axis, file in zip(figure.subplots(1, max(len(files), 1), squeeze=False)[0], files, strict=False):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        positive = True
        for name in dict.fromkeys(k for r in rows for k in r if k != "step" and not k.endswith("grad_norm")):
            told = [r for r in rows if name in r]  # a role is not updated in every step
            axis.plot([r["step"] for r in told], _smooth([r[name] for r in told]), label=name, linewidth=1)
            positive = positive and all(r[name] > 0 for r in told)
        axis.set(title=file.stem, xlabel="step", yscale="log" if positive else "linear")
        axis.legend(fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=80)


def _smooth(values: list[float], decay: float = 0.9) -> list[float]:
    """Exponential moving average, corrected at the start."""
    out: list[float] = []
    total = weight = 0.0
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        out.append(total / weight)
    return out
