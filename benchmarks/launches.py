"""Kernels that a denoising step launches, ours beside diffusers': `python -m benchmarks.launches`.

Both run the same tiny random models of two layers on the pretend device (`benchmarks.pretend_device`), in float32 and
bfloat16: the numbers depend on no machine. Counted are the launches, the synchronisations and the copies from pageable
memory of the last step but one, guidance and solver included. Families that diffusers does not have stand alone.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch

from benchmarks.measure import ROOT, environment, report
from benchmarks.pretend_device import DEVICE, Counts, pretend_device
from kinetoscope import VideoGenerator

sys.path.insert(0, str(ROOT / "tests"))  # the tiny models of the tests

from device.rows import MODELS, PICTURE
from models.tiny_cosmos import NoGuardrail, without_torchvision

STEPS = 4
PROMPT, NEGATIVE = "a red circle moving left on black", "a blue cat"
SIZE: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": STEPS}


@dataclass(frozen=True)
class Family:
    """One line of the table.

    Attributes:
        model: key of `device.rows.MODELS`.
        oracle: class of diffusers; "": none.
        frames: of the video.
        fields: further fields of both.
        ours, theirs: fields of one of them.
        image: whether it starts from a picture.
    """

    model: str
    oracle: str = ""
    frames: int = 9
    fields: dict[str, Any] = field(default_factory=dict[str, Any])
    ours: dict[str, Any] = field(default_factory=dict[str, Any])
    theirs: dict[str, Any] = field(default_factory=dict[str, Any])
    image: bool = False


FAMILIES: dict[str, Family] = {
    "Wan 2.1 T2V": Family("wan-two-layers", "WanPipeline"),
    "Wan 2.1 I2V": Family("wan-i2v", "WanImageToVideoPipeline", image=True),
    "Wan 2.2 A14B": Family("wan-a14b", "WanPipeline"),
    "Wan 2.2 TI2V": Family("wan-ti2v", "WanPipeline"),
    "FastWan": Family("fast-wan", ours={"num_inference_steps": None}),
    "causal Wan": Family("causal", ours={"num_inference_steps": None}),
    "SkyReels-V2 T2V": Family("skyreels-t2v", "SkyReelsV2Pipeline"),
    "SkyReels-V2 DF": Family("skyreels", "SkyReelsV2DiffusionForcingPipeline"),
    "Cosmos Predict 1": Family("cosmos", "CosmosTextToWorldPipeline", 17),
    "Cosmos Predict 2 V2W": Family("cosmos2-video", "Cosmos2VideoToWorldPipeline", image=True),
    "Cosmos Predict 2.5": Family("cosmos2.5", "Cosmos2_5_PredictBasePipeline", image=True),
    "HunyuanVideo": Family(
        "hunyuan", "HunyuanVideoPipeline", fields={"true_cfg_scale": 2.0}, theirs={"negative_prompt": NEGATIVE}
    ),
    "HunyuanVideo 1.5": Family("hunyuan15", "HunyuanVideo15Pipeline"),
    "LTX-Video": Family("ltx", "LTXPipeline"),
    "LongCat-Video": Family("longcat"),
    "Matrix-Game 2": Family("matrix-game", ours={"num_inference_steps": None, "negative_prompt": None}, image=True),
}


def our_step(family: Family, path: Path, dtype: str, counts: Counts) -> Counts:
    """Return what was counted in our step."""
    generator = VideoGenerator.from_pretrained(path, device=DEVICE, dtype=dtype)
    given = {"image": PICTURE} if family.image else {}
    fields = {**SIZE, "num_frames": family.frames, "negative_prompt": NEGATIVE, **given, **family.fields, **family.ours}
    steps: list[Counts] = []
    before = counts.copy()
    for event in generator.iterate(PROMPT, **fields):
        if event.kind == "step":
            steps.append(counts.since(before))
        before = counts.copy()
    return steps[-2]


def their_step(family: Family, path: Path, dtype: torch.dtype, counts: Counts) -> Counts:
    """Return what was counted from the call of the transformer in one step of diffusers to that in the next."""
    from PIL import Image

    kind: Any = getattr(diffusers, family.oracle)
    with ExitStack() as stack:
        if "Cosmos" in family.oracle:
            stack.enter_context(without_torchvision())
        more = {"safety_checker": NoGuardrail()} if "Cosmos" in family.oracle else {}
        pipeline = kind.from_pretrained(path, **more)
        pipeline.set_progress_bar_config(disable=True)
        for name in ("transformer", "transformer_2"):
            if (module := getattr(pipeline, name, None)) is not None:
                setattr(pipeline, name, _in_dtype(module, dtype))
        pipeline.to(DEVICE)
        marks: list[Counts] = []
        scheduler = type(pipeline.scheduler)  # the class: some pipelines copy their scheduler
        stack.callback(setattr, scheduler, "step", scheduler.step)
        scheduler.step = _marked(scheduler.step, marks, counts)
        fields: dict[str, Any] = {**SIZE, "num_frames": family.frames, **family.fields, **family.theirs}
        if family.image:
            fields["image"] = Image.fromarray(PICTURE)
        pipeline(prompt=PROMPT, generator=torch.Generator().manual_seed(0), output_type="latent", **fields)
    return marks[-2].since(marks[-3])


def _marked(step: Callable[..., Any], marks: list[Counts], counts: Counts) -> Callable[..., Any]:
    """Return `step` of a scheduler, which notes the counts at the end of each call."""

    def call(*args: Any, **kwargs: Any) -> Any:
        made = step(*args, **kwargs)
        marks.append(counts.copy())
        return made

    return call


def _in_dtype(module: Any, dtype: torch.dtype) -> Any:
    """Return a copy in `dtype`, but for the parameters that the published policy keeps in float32."""
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    module = copy.deepcopy(module)
    for name, parameter in module.named_parameters():
        if not kept & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return module


def measure(family: Family, path: Path, dtype: str, counts: Counts) -> dict[str, Any]:
    """Return the counts of both in one dtype."""
    own = our_step(family, path, dtype, counts).totals()
    found: dict[str, Any] = {"ours": {k: own[k] for k in ("launches", "syncs", "copies", "mixes")}}
    if family.oracle:
        with torch.no_grad():
            other = their_step(family, path, getattr(torch, dtype), counts).totals()
        found["diffusers"] = {k: other[k] for k in ("launches", "syncs", "copies", "mixes")}
        found["ratio"] = own["launches"] / other["launches"]
    return found


def main() -> None:
    """Count all families that were asked for, and print the table as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", action="append", choices=tuple(FAMILIES), help="one of them; more than once")
    parser.add_argument("--json-out", type=Path, help="file, or folder for launches.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"benchmark": "launches", **environment(), "layers": 2, "steps": STEPS, "families": {}}
    with tempfile.TemporaryDirectory() as folder, pretend_device() as counts:
        for name in options.family or FAMILIES:
            family, path = FAMILIES[name], Path(folder) / FAMILIES[name].model
            if not path.exists():
                path.mkdir()
                MODELS[family.model](path)
            sys.stderr.write(f"{name} ...\n")
            result["families"][name] = {d: measure(family, path, d, counts) for d in ("float32", "bfloat16")}
    report(result, "launches", options.json_out)


if __name__ == "__main__":
    main()
