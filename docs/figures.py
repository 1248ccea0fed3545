"""Puts what was measured into README.md: `python docs/figures.py`, after `make bench` and `kinetoscope eval --card`.

The scores are the model card's, the times those of benchmarks/results; a test holds that the README says the same.
`python docs/figures.py gif` also makes the moving picture, from the embedded model.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
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
    ("mid_float32", "step"): "the same in float32",
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
    file = RESULTS / "vs_diffusers.json"
    if file.exists():
        result = json.loads(file.read_text(encoding="utf-8"))
        lines += [
            f"`make bench` on {result['device']}, {result['threads']} threads, torch {result['torch']}, diffusers "
            f"{result['diffusers']}; medians of alternating pairs on the same weights.",
            "",
            "| | diffusers | Kinetoscope | ratio |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {label} | {_time(r['diffusers_s'])} | {_time(r['ours_s'])} | {r['ratio']:.2f}x |"
            for (part, what), label in PARTS.items()
            if (r := result.get(part, {}).get(what))
        ]
    file = RESULTS / "engine_overhead.json"
    if file.exists():
        cost = json.loads(file.read_text(encoding="utf-8"))["auto"]["overhead_us_a_step"]
        lines += [
            "",
            f"Beyond network, guidance and scheduler the engine costs {cost:.0f} microseconds a step.",
        ]
    return "\n".join(lines).strip()


def filled(text: str) -> str:
    """`text` with every part between `<!-- figures NAME -->` and `<!-- end -->` written anew."""
    for name, make in {"picture": picture, "scores": scores, "speed": speed}.items():
        block = re.compile(rf"(<!-- figures {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        body = make()
        text = block.sub(lambda m, body=body: m[1] + (body + "\n" if body else "") + m[2], text)
    return text


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
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
