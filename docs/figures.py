"""Puts what was measured into README.md and docs: `python docs/figures.py`, after `make bench` and `eval --card`.

The scores are the model card's, the others those of benchmarks/results; a test holds that the pages say the same.
`python docs/figures.py gif` also makes the moving picture, from the embedded model.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kinetoscope.loading import resolve_model

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
CARD = ROOT / "src/kinetoscope/reference/models/tiny-t2v/README.md"
RESULTS = ROOT / "benchmarks" / "results"
GIF = ROOT / "docs" / "images" / "tiny-t2v.gif"
PROMPTS = (
    "a large red circle moving left on a navy background",
    "a large yellow star circling clockwise on a black background",
    "a large green square moving up on a white background",
    "a small cyan triangle bouncing up and down on a striped background",
    "a large purple cross moving right on a checkered background",
    "a small orange circle moving down on a navy background",
)
PARTS = {
    ("mid_bfloat16", "step"): "12 layers, 768 wide, 2,025 tokens: a step in bfloat16",
    ("mid_float32", "step"): "a step of a random Wan of 12 x 768 at 2,025 tokens, in float32",
    ("embedded_float32", "denoising"): "`tiny-t2v` in float32: denoising",
    ("embedded_float32", "end_to_end"): "`tiny-t2v` in float32: prompt to frames",
    ("embedded_bfloat16", "denoising"): "`tiny-t2v` in bfloat16: denoising",
    ("embedded_bfloat16", "end_to_end"): "`tiny-t2v` in bfloat16: prompt to frames",
}


def picture() -> str:
    """The moving picture and what it shows."""
    if not GIF.exists():
        return ""
    prompts = "; ".join(f"*{p}*" for p in PROMPTS)
    return f"![six videos of tiny-t2v]({GIF.relative_to(ROOT)})\n\n`tiny-t2v`, seed 0: {prompts}."


def scores() -> str:
    """The scores of the model card."""
    if not CARD.exists() or "## Scores" not in (card := CARD.read_text(encoding="utf-8")):
        return ""
    return f"From its [model card]({CARD.relative_to(ROOT)}):\n\n{card.partition('## Scores')[2].strip()}"


def speed() -> str:
    """Times beside diffusers', and what the engine costs."""
    lines: list[str] = []
    if result := _result("vs_diffusers"):
        count = result["mid_float32"]["step"]["pairs"]
        lines += [
            f"`python -m benchmarks.vs_diffusers` on {result['device']}, {_threads(result)}, torch {result['torch']}, "
            f"diffusers {result['diffusers']}; medians of {count} alternating pairs on the same weights.",
            "",
            "| | diffusers | Kinetoscope | ratio |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {label} | {_time(r['diffusers_s'])} | {_time(r['ours_s'])} | {r['ratio']:.2f}x |"
            for (part, what), label in PARTS.items()
            if (r := result.get(part, {}).get(what))
        ]
    if overhead := _result("engine_overhead"):
        cost = overhead["auto"]["overhead_us_a_step"]
        lines += [
            "",
            f"Beyond network, guidance and scheduler the engine costs {cost:.0f} microseconds a step "
            f"({overhead['device']}).",
        ]
    return "\n".join(lines).strip()


def few_step() -> str:
    """The few-step student beside its teacher."""
    scored = [_result(name) for name in ("eval_tiny-t2v", "eval_tiny-t2v-4step", "eval_tiny-t2v_4_steps")]
    reports = [found["model"] for found in scored if found is not None]
    times = _result("few_step")
    if times is None or len(reports) < len(scored):
        return ""
    count, sooner = reports[0]["shape"]["n"], [times[part]["ratio"] for part in ("denoising", "prompt to frames")]
    lines = [
        f"`kinetoscope eval --n {count} --dtype float32`, captions that were never trained on, with 95 % intervals:",
        "",
        *_table(
            ("`tiny-t2v`, its teacher", "`tiny-t2v-4step`", "teacher with `--steps 4 --guidance-scale 1`"), reports
        ),
        "",
        f"The student denoises in 1/{sooner[0]:.1f} of the time, and has made a video in 1/{sooner[1]:.1f} of it "
        f"(`python -m benchmarks.few_step`, {times['device']}, {_threads(times)}).",
    ]
    return "\n".join(lines)


def causal() -> str:
    """The causal student beside its teacher, on clips as long as in training and five times as long."""
    scored = [_result(name) for name in ("eval_tiny-t2v", "eval_tiny-causal", "eval_tiny-causal_long")]
    found = [result for result in scored if result is not None]
    if len(found) < len(scored):
        return ""
    reports, drift = [result["model"] for result in found], found[-1]["drift"]
    counts, part, frames = [result["n"] for result in found], drift["spans"][1], drift["spans"][-1][1]
    row = drift["model"]["all correct"]
    commands = " and ".join(f"`{result['command']}`" for result in found[1:])
    names = ("`tiny-t2v`, its teacher", "`tiny-causal`", f"`tiny-causal`, {frames} frames")
    lines = [
        f"{commands}, captions that were never trained on, with 95 % intervals:",
        "",
        *_table([f"{name}, {count} videos" for name, count in zip(names, counts, strict=True)], reports),
        "",
        f"Judged in parts of {part[1] - part[0]} frames, all is right in {row[0]:.3f} of the first parts, in "
        f"{row[-1]:.3f} of the last and in {min(row):.3f} of the worst.",
    ]
    return "\n".join(lines)


def world() -> str:
    """How well the world is played."""
    scored, others = _result("eval_tiny-world"), _result("eval_tiny-world_other_games")
    if scored is None or others is None:
        return ""
    reports = [scored[name] for name in ("model", "ground truth", "shuffled actions")]
    views, more = scored["drift"]["model"]["view"], others["model"]["all correct"]
    lines = [
        f"`{scored['command']}`, {reports[0]['all correct']['n']} actions, with 95 % intervals:",
        "",
        *_table(("`tiny-world`", "true mazes, same player", "shuffled actions"), reports),
        "",
        f"Views that are a maze: {views[0]:.3f} in the first part, {views[-1]:.3f} in the last, after 500 frames, and "
        f"{min(views):.3f} in the worst.",
        "",
        f"In {others['n']} other games (`--seed {others['seed']}`) {more['value']:.3f} [{more['low']:.3f}, "
        f"{more['high']:.3f}] of {more['n']} actions are followed.",
    ]
    return "\n".join(lines)


def play() -> str:
    """How fast the world is played with its own blocks and steps, and how soon an action is seen."""
    result = _result("play")
    if result is None:
        return ""
    own = resolve_model(result["model"])
    block = own.config("transformer")["num_frames_per_block"]
    steps = own.sidecar["defaults"]["num_inference_steps"]
    lines = [
        f"`python -m benchmarks.play` on {_model(result)}, {result['device']}, float32; {result['blocks']} blocks of "
        f"{block} latent frame in {steps} steps each:",
        "",
        "| threads | frames a second | action to sight, as fast as blocks are made | at 16 frames a second |",
        "|---|---|---|---|",
    ]
    for s in result["sessions"]:
        if (s["block_latent_frames"], s["steps"]) == (block, steps):
            sight = [f"{s[kind]['p50']:.0f} ms, p95 {s[kind]['p95']:.0f}" for kind in ("free_ms", "paced_ms")]
            lines.append(f"| {s['threads']} | {s['frames_a_second']:.1f} | {' | '.join(sight)} |")
    return "\n".join(lines)


def caches() -> str:
    """Every step cache at its documented setting."""
    result = _result("caches")
    if result is None:
        return ""
    lines = [f"{_where(result)}; {result['videos']} videos of {result['steps']} steps:", "",
             "| setting | faster | rows left out | SSIM, median and worst |", "|---|---|---|---|"]  # fmt: skip
    for r in result["caches"]:
        share = statistics.fmean(r["skipped"]) / r["rows"]
        lines.append(
            f"| `{r['cache']}` | {r['speedup']:.1f}x | {share:.0%} | {r['ssim_median']:.3f}, {r['ssim_worst']:.3f} |"
        )
    return "\n".join(lines)


def settings(group: str) -> str:
    """What the settings of a group change of a video, and how much faster they are."""
    result = _result("settings")
    rows = (result or {}).get("groups", {}).get(group)
    if not result or not rows:
        return ""
    against = f"against `{rows[0]['a']}`" if rows[0]["a"] else "against the default"
    count, steps = rows[0]["pairs"], rows[0]["steps"]
    heads = ("setting", "SSIM, mean and worst", "worst PSNR", "latents apart, in std", "attributes right", "time")
    lines = [
        f"{_where(result)}; {against}, {count} video{'s' * (count > 1)} of {steps} steps (attributes of the prompt "
        "that the video shows, before -> after; time, before / after):",
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    for r in rows:
        cells = [
            f"`{r['b']}`",
            f"{r['ssim']['mean']:.4f}, {r['ssim']['worst']:.4f}",
            "equal" if r["psnr"] is None else f"{r['psnr']:.1f} dB",
            f"{r['latent_difference']:.2g}",
            " -> ".join(f"{share:.2f}" for share in r["prompt_following"]),
            f"{r['faster']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def launches() -> str:
    """Kernels, synchronisations and copies of a step, beside diffusers'."""
    result = _result("launches")
    if result is None:
        return ""
    heads = ("family", "launches", "`--cfg sequential`", "diffusers", "ratios", "host waits", "diffusers")
    lines = [
        f"`python -m benchmarks.launches` (torch {result['torch']}, diffusers {result['diffusers']}): one step with "
        f"guidance and solver, tiny models of {result['layers']} layers in {result['dtype']}; host waits are reads of "
        "a device value and copies from pageable memory:",
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    for name, found in result["families"].items():
        own, other = [found["auto"], found["sequential"]], found.get("diffusers")
        cells = [str(each["launches"]) for each in own]
        if other:
            cells += [str(other["launches"]), ", ".join(f"{each['launches'] / other['launches']:.2f}" for each in own)]
        else:
            cells += ["", ""]
        cells += [str(each["syncs"] + each["copies"]) if each else "" for each in (own[0], other)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


SECTIONS: dict[str, Callable[[], str]] = {
    "picture": picture,
    "scores": scores,
    "speed": speed,
    "few_step": few_step,
    "causal": causal,
    "world": world,
    "play": play,
    "caches": caches,
    "launches": launches,
    **{name: partial(settings, name) for name in ("exact", "text", "guidance", "quantize", "sparse", "bfloat16")},
}


def filled(text: str) -> str:
    """`text` with every part between `<!-- figures NAME -->` and `<!-- end -->` written anew."""
    for name, make in SECTIONS.items():
        block = re.compile(rf"(<!-- figures {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if block.search(text):
            body = make()
            text = block.sub(lambda m, body=body: m[1] + (body + "\n" if body else "") + m[2], text)
    return text


def _table(heads: Sequence[str], reports: Sequence[dict[str, Any]]) -> list[str]:
    """Scores of each attribute, a column a report."""
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for attribute in reports[0]:
        scores = [report[attribute] for report in reports]
        cells = [f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]" for score in scores]
        lines.append(f"| {attribute} | {' | '.join(cells)} |")
    return lines


def _result(name: str) -> dict[str, Any] | None:
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _where(result: dict[str, Any]) -> str:
    return f"`python -m benchmarks.{result['benchmark']}` on {_model(result)}, {result['device']}, {_threads(result)}"


def _model(result: dict[str, Any]) -> str:
    present = resolve_model(result["model"]).fingerprint() == result["model_hash"]
    return f"`{result['model']}`" if present else f"an earlier `{result['model']}` ({result['model_hash'][:8]})"


def _threads(result: dict[str, Any]) -> str:
    cores = result.get("cores", result["threads"])
    on = f" on {cores} core{'s' * (cores > 1)}" if cores != result["threads"] else ""
    return f"{result['threads']} thread{'s' * (result['threads'] > 1)}{on}"


def make_gif() -> None:
    """Six videos of the embedded model side by side, twice as large."""
    from PIL import Image

    from kinetoscope import VideoGenerator

    generator = VideoGenerator.from_pretrained("tiny-t2v", device="cpu", dtype="float32")
    videos = [r.frames for r in generator.generate_video(list(PROMPTS), seed=0)]
    count, height, width, _ = videos[0].shape
    side, gap, columns = 2, 6, 3
    cell = (side * width + gap, side * height + gap)
    pictures: list[Any] = []
    for t in range(count):
        page = Image.new("RGB", (columns * cell[0] + gap, len(videos) // columns * cell[1] + gap), "white")
        for i, video in enumerate(videos):
            tile = Image.fromarray(video[t]).resize((side * width, side * height), Image.Resampling.NEAREST)
            page.paste(tile, (gap + i % columns * cell[0], gap + i // columns * cell[1]))
        pictures.append(page.quantize(128, dither=Image.Dither.NONE))
    GIF.parent.mkdir(exist_ok=True)
    pictures[0].save(GIF, save_all=True, append_images=pictures[1:], duration=83, loop=0, optimize=True)


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"


if __name__ == "__main__":
    if "gif" in sys.argv[1:]:
        make_gif()
    for page in PAGES:
        old = page.read_text(encoding="utf-8")
        if (new := filled(old)) != old:
            page.write_text(new, encoding="utf-8")
