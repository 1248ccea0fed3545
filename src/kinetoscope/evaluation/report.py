"""A comparison as one HTML page that needs nothing else: no scripts, no network."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

from kinetoscope.evaluation.compare import NAMES, Comparison, Pair, Thresholds
from kinetoscope.evaluation.pictures import SideBySide, heat_colours

SHOWN = 12
"""Pairs with pictures: the worst ones."""

_STYLE = """
:root { --ink: #1d2129; --soft: #667085; --line: #e4e7ec; --page: #f6f7f9; --card: #fff; --pass: #067647;
  --fail: #b42318; --a: #3538cd; --b: #c4320a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ec; --soft: #98a2b3; --line: #2d333f; --page: #12151b;
  --card: #1b1f27; --pass: #47cd89; --fail: #f97066; --a: #a4bcfd; --b: #f7b27a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 36px 0 10px; }
section, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px; }
.card { margin: 14px 0; } .soft { color: var(--soft); } .num { font-variant-numeric: tabular-nums; }
.badge { display: inline-block; padding: 2px 12px; border-radius: 999px; color: #fff; font-weight: 600; font-size: 14px;
  vertical-align: 3px; margin-left: 10px; }
.badge.pass { background: var(--pass); } .badge.fail { background: var(--fail); }
@media (prefers-color-scheme: dark) { .badge { color: #12151b; } }
ul.failures { color: var(--fail); margin: 10px 0 0; padding-left: 20px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 16px 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; }
.tile b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; } td, th { padding: 5px 10px; text-align: right;
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
tr:last-child td { border-bottom: 0; } td + td, th { white-space: nowrap; }
td.bad { white-space: normal; text-align: left; }
td:first-child, th:first-child { text-align: left; }
th { font-weight: 600; color: var(--soft); } .facts-table td + td { white-space: normal; word-break: break-word; }
.a { color: var(--a); } .b { color: var(--b); }
.total td { font-weight: 600; }
.strip { display: grid; grid-template-columns: 26px repeat(var(--n), minmax(0, 1fr)); gap: 5px; align-items: center;
  margin-top: 12px; }
.strip img { width: 100%; display: block; border-radius: 4px; } .pixel { image-rendering: pixelated; }
.strip span { text-align: center; font-size: 12px; color: var(--soft); }
.strip .side { font-weight: 700; font-size: 14px; } .strip .a { color: var(--a); } .strip .b { color: var(--b); }
.scale { height: 8px; width: 120px; border-radius: 4px; display: inline-block; vertical-align: 0; margin: 0 6px; }
.facts { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 2px; }
.bad { color: var(--fail); } details { margin-top: 10px; } summary { cursor: pointer; color: var(--soft); }
details img { max-width: 100%; width: calc(var(--n) * 1px); margin-top: 8px; border-radius: 4px; }
code { background: var(--page); border: 1px solid var(--line); border-radius: 5px; padding: 1px 6px; font-size: 13px; }
svg { display: block; width: 100%; height: 44px; margin-top: 10px; }
"""


def html_report(
    comparison: Comparison, thresholds: Thresholds, pictures: Mapping[str, SideBySide], title: str = "A against B"
) -> str:
    """The page.

    Args:
        pictures: pair name -> its pictures; of at most `SHOWN` pairs, the least similar ones, they are shown.
    """
    failures = comparison.failures(thresholds)
    verdict = "fail" if failures else "pass"
    labels = "".join(
        f'<div><b class="{side.lower()}">{side}</b> <code>{_e(label) or "defaults"}</code></div>'
        for side, label in zip("AB", comparison.labels, strict=True)
    )
    told = "".join(f"<li>{_e(line)}</li>" for line in failures)
    order = sorted(comparison.pairs, key=_badness)
    shown = [p for p in order if p.name in pictures][:SHOWN]
    rest = len(comparison.pairs) - len(shown)
    notes = "".join(f"<li>{_e(n)}</li>" for n in comparison.notes)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_e(title)}: {verdict}</title><style>{_STYLE}</style></head><body><main>
<h1>{_e(title)}<span class="badge {verdict}">{verdict}</span></h1>
<div class="soft">{_e(_subtitle(comparison))}</div>
<div class="card">{labels}{f'<ul class="failures">{told}</ul>' if told else ""}</div>
{_tiles(comparison, thresholds)}
{_times(comparison)}
<h2>Pairs</h2>
{_pair_table(order)}
{"".join(_card(p, pictures[p.name]) for p in shown)}
{f'<p class="soft">{rest} more without pictures.</p>' if shown and rest else ""}
{f'<h2>Not measured</h2><ul class="soft">{notes}</ul>' if notes else ""}
{_facts(comparison)}
</main></body></html>
"""


def _badness(pair: Pair) -> float:
    """Smaller is shown earlier."""
    if pair.scores is None:
        return -2.0
    mean = pair.scores.mean_ssim
    return -pair.scores.error if mean is None else mean


def _subtitle(comparison: Comparison) -> str:
    facts, count = comparison.facts, len(comparison.pairs)
    parts = [f"{count} pair{'s' if count != 1 else ''} of videos"]
    if "model" in facts:
        parts.append(f"model {facts['model']}")
    if "device" in facts:
        parts.append(f"{facts['device']}, {facts.get('dtype', '')}, {facts.get('threads', '?')} threads")
    return " · ".join(parts)


def _tiles(comparison: Comparison, thresholds: Thresholds) -> str:
    limits = thresholds.asked()
    tiles: list[str] = []
    for name, values in comparison.measures().items():
        key = {"latent_difference": "latent_diff"}.get(name, name)
        limit = limits.get(f"min_{key}", limits.get(f"max_{key}"))
        mean = "" if name == "largest_difference" else f"mean {number(name, values['mean'])}"
        asked = "" if limit is None else f"limit {limit:g}"
        below = " · ".join(part for part in (mean, asked) if part)
        label = NAMES[name][0].upper() + NAMES[name][1:]
        tiles.append(_tile(f"{label}, worst", number(name, values["worst"]), below))
    if time := comparison.time():
        ratio = time["total"]["ratio"]
        word = f"{1 / ratio:.2f}x as fast" if 0 < ratio < 1 else f"{ratio:.2f}x as long"
        tiles.append(_tile("Time, B / A", f"{ratio:.3f}", f"{word}; median of pairs run in turns"))
    if memory := comparison.memory():
        tiles.append(_tile("Peak memory, B / A", f"{memory['ratio']:.3f}", f"A {memory['a'] / 2**20:,.0f} MiB"))
    if following := comparison.following():
        a, b = following
        tiles.append(_tile("Prompt following, B", f"{b.value:.3f}", f"A {a.value:.3f} of {a.total} attributes"))
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _tile(name: str, value: str, below: str) -> str:
    words = f'<span class="soft">{_e(name)}</span><b>{_e(value)}</b><small class="soft">{_e(below)}</small>'
    return f'<div class="tile">{words}</div>'


def number(name: str, value: float | None) -> str:
    """A measure's value in words fit for a table."""
    if value is None:
        return "-"
    if name == "psnr":
        return "equal" if value == float("inf") else f"{value:.2f} dB"
    if name == "largest_difference":
        return f"{value:.0f}"
    if name == "latent_difference":
        return f"{value:.3g} std"
    if name == "flicker_rise":
        return f"{value:+.2f}"
    if name in ("ssim", "ms_ssim"):  # 0.99999 must not look like 1
        return "1" if value == 1 else f"{min(value, 0.999999) if value < 1 else value:.6f}"
    return f"{value:.4f}"


def _times(comparison: Comparison) -> str:
    time = comparison.time()
    if not time:
        return ""
    rows = "".join(
        f"<tr{' class=total' if stage == 'total' else ''}><td>{_e(stage.replace('_', ' '))}</td><td>{t['a']:.3f} s</td>"
        f"<td>{t['b']:.3f} s</td><td>{t['ratio']:.3f}</td></tr>"
        for stage, t in time.items()
        if max(t["a"], t["b"]) >= 0.0005
    )
    head = '<th>stage</th><th class="a">A</th><th class="b">B</th><th>B / A</th>'
    return f"<h2>Wall time</h2><section><table><tr>{head}</tr>{rows}</table></section>"


def _pair_table(pairs: Sequence[Pair]) -> str:
    rows: list[str] = []
    for pair in pairs:
        s = pair.scores
        if s is None:
            rows.append(f'<tr><td>{_e(pair.name)}</td><td class="bad" colspan="5">{_e(pair.problem)}</td></tr>')
            continue
        flick = "-" if s.flicker is None else f"{s.flicker[0]:.2f} / {s.flicker[1]:.2f}"
        latent = None if pair.latents is None else pair.latents[0]
        cells = (
            number("ssim", s.mean_ssim), number("ms_ssim", s.ms_ssim), number("psnr", s.psnr),
            number("latent_difference", latent), flick,
        )  # fmt: skip
        rows.append(f"<tr><td>{_e(pair.name)}</td>{''.join(f'<td>{c}</td>' for c in cells)}</tr>")
    head = "<th>pair</th><th>SSIM</th><th>MS-SSIM</th><th>PSNR</th><th>latents, max</th><th>flicker A / B</th>"
    return f"<section><table><tr>{head}</tr>{''.join(rows)}</table></section>"


def _card(pair: Pair, shown: SideBySide) -> str:
    assert pair.scores is not None
    s = pair.scores
    same = s.error == 0
    pixel = ' class="pixel"' if max(shown.size) < 160 else ""

    def row(side: str, pictures: Sequence[bytes], word: str) -> str:
        images = "".join(
            f'<img{pixel} alt="{word}, frame {t}" src="{_data(p, "png")}">'
            for t, p in zip(shown.frames, pictures, strict=True)
        )
        return f'<span class="side {side.lower()}">{side}</span>{images}'

    rows = row("A", shown.a, "A")
    if not same:
        rows += row("B", shown.b, "B") + row("Δ", shown.heat, "difference")
    gradient = f"background: linear-gradient(90deg, {', '.join(heat_colours())})"
    scale = "equal, bit for bit" if same else f'0 <span class="scale" style="{gradient}"></span> {shown.brightest:.0f}'
    judged = ""
    if pair.judged and pair.judged[0]:
        told = [f'<b class="{side}">{side.upper()}</b> {_hits(j)}' for side, j in zip("ab", pair.judged, strict=True)]
        judged = f"<span>judge: {' · '.join(told)}</span>"
    width = 3 * shown.size[1] * (2 if pixel else 1)
    moving = (
        f'<details><summary>moving</summary><img{pixel} style="--n: {width}" alt="A, B and their difference, moving" '
        f'src="{_data(shown.moving, "webp")}"></details>'
        if shown.moving
        else ""
    )
    return f"""<div class="card"><b>{_e(pair.name)}</b>
<div class="facts soft"><span>SSIM {number("ssim", s.mean_ssim)}</span><span>PSNR {number("psnr", s.psnr)}</span>
<span>|A - B| in grey levels: {scale}</span>{judged}</div>
<div class="strip" style="--n: {len(shown.frames)}">{rows}
<span></span>{"".join(f"<span>{t}</span>" for t in shown.frames)}</div>
{"" if same else _curve(s.ssim) + moving}</div>"""


def _hits(judged: Mapping[str, bool]) -> str:
    return " ".join(
        f"<span{'' if hit else ' class=bad'}>{_e(name)} {'✓' if hit else '✗'}</span>" for name, hit in judged.items()
    )


def _curve(values: Sequence[float] | None) -> str:
    """SSIM over the frames, from its lowest to 1, as a line."""
    if values is None or len(values) < 3:
        return ""
    low = min(values)
    span = max(1 - low, 1e-12)
    step = 1000 / (len(values) - 1)
    points = " ".join(f"{i * step:.1f},{4 + 36 * (1 - (v - low) / span):.1f}" for i, v in enumerate(values))
    label = f"SSIM of each frame, lowest {low:.4f}"
    return (
        f'<svg viewBox="0 0 1000 44" preserveAspectRatio="none" role="img" aria-label="{label}"><title>{label}</title>'
        '<line x1="0" y1="4" x2="1000" y2="4" stroke="var(--line)"/>'
        f'<polyline points="{points}" fill="none" stroke="var(--b)" stroke-width="2" '
        'vector-effect="non-scaling-stroke"/></svg>'
        f'<small class="soft">{label}; the grey line is 1</small>'
    )


def _facts(comparison: Comparison) -> str:
    rows = "".join(
        f"<tr><td>{_e(k.replace('_', ' '))}</td><td>{_e(_flat(v))}</td></tr>" for k, v in comparison.facts.items()
    )
    return (
        f"<h2>Where this was measured</h2><section><table class='facts-table'>{rows}</table></section>" if rows else ""
    )


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_flat(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_flat, value))
    return str(value)


def _data(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _e(text: str) -> str:
    return html.escape(text)
