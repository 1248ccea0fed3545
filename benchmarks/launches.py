"""Kernels that a denoising step launches, ours beside diffusers': `python -m benchmarks.launches`.

Both run the same tiny random models of two layers in bfloat16 on the pretend device (`benchmarks.pretend_device`), each
family in a process of its own: the numbers depend on no machine. Counted are the launches, the synchronisations and the
copies from pageable memory of the last step but one, guidance and solver included. Families that diffusers does not
have stand alone. diffusers' VAE, which no step uses, is in float32: the CPU lacks some of its kernels in bfloat16.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
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
DTYPE = "bfloat16"
PLANS = ("auto", "sequential")
"""Our plans of guidance: at this size `auto` computes both branches in one forward, as diffusers does for LTX alone."""
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
    "Cosmos Predict 1 T2W": Family("cosmos", "CosmosTextToWorldPipeline", 17),
    "Cosmos Predict 1 V2W": Family("cosmos1-video", "CosmosVideoToWorldPipeline", 17, image=True),
    "Cosmos Predict 2 V2W": Family("cosmos2-video", "Cosmos2VideoToWorldPipeline", image=True),
    "Cosmos Predict 2.5": Family("cosmos2.5", "Cosmos2_5_PredictBasePipeline", image=True),
    "HunyuanVideo": Family("hunyuan", "HunyuanVideoPipeline"),
    "HunyuanVideo, true_cfg_scale=2": Family("hunyuan", "HunyuanVideoPipeline", fields={"true_cfg_scale": 2.0}),
    "HunyuanVideo 1.5": Family("hunyuan15", "HunyuanVideo15Pipeline"),
    "LTX-Video": Family("ltx", "LTXPipeline"),
    "LTX-Video I2V": Family("ltx-i2v", "LTXImageToVideoPipeline", image=True),
    "LongCat-Video": Family("longcat"),
    "Matrix-Game 2": Family("matrix-game", ours={"num_inference_steps": None, "negative_prompt": None}, image=True),
}


def our_step(family: Family, path: Path, counts: Counts, plan: str) -> Counts:
    """Return what was counted in our step, with the guidance's branches computed by a plan of `cfg`."""
    generator = VideoGenerator.from_pretrained(path, device=DEVICE, dtype=DTYPE, cfg=plan)
    given = {"image": PICTURE} if family.image else {}
    fields = {**SIZE, "num_frames": family.frames, "negative_prompt": NEGATIVE, **given, **family.fields, **family.ours}
    steps: list[Counts] = []
    before = counts.copy()
    for event in generator.iterate(PROMPT, **fields):
        if event.kind == "step":
            steps.append(counts.since(before))
        before = counts.copy()
    return steps[-2]


@torch.no_grad()
def their_step(family: Family, path: Path, counts: Counts) -> Counts:
    """Return what was counted from the end of one step of diffusers to the end of the next."""
    from PIL import Image

    kind: Any = getattr(diffusers, family.oracle)
    marks: list[Counts] = []

    @contextmanager
    def progress_bar(*_: Any, **__: Any) -> Iterator[Any]:
        yield SimpleNamespace(update=lambda *_: marks.append(counts.copy()))

    with ExitStack() as stack:
        fields: dict[str, Any] = {**SIZE, "num_frames": family.frames, "negative_prompt": NEGATIVE, **family.fields}
        more: dict[str, Any] = {}
        if "Cosmos" in family.oracle:
            stack.enter_context(without_torchvision())
            more["safety_checker"] = NoGuardrail()
        if family.image:
            fields["image"] = Image.fromarray(PICTURE)
        if "2_5" in family.oracle:  # the stand-in of torchvision takes tensors
            fields["image"] = torch.from_numpy(PICTURE).permute(2, 0, 1) / 255
        dtypes = {"default": getattr(torch, DTYPE), "vae": torch.float32}
        pipeline = kind.from_pretrained(path, torch_dtype=dtypes, **more)
        encode = pipeline.vae.encode
        pipeline.vae.encode = lambda video: encode(video.float())
        pipeline.progress_bar = progress_bar  # which every pipeline tells of its steps
        pipeline.to(DEVICE)
        source = torch.Generator().manual_seed(0)
        fields |= {"generator": source, "output_type": "latent", **family.theirs}
        pipeline(prompt=PROMPT, **fields)
    return marks[-2].since(marks[-3])


def measure(name: str) -> dict[str, dict[str, int]]:
    """Return the counts of a step of a family, by plan and of diffusers; for a process of its own."""
    torch.set_num_threads(1)
    family = FAMILIES[name]
    with tempfile.TemporaryDirectory() as folder, pretend_device() as counts:
        path = Path(folder)
        MODELS[family.model](path)
        found = {plan: _totals(our_step(family, path, counts, plan)) for plan in PLANS}
        if family.oracle:
            found["diffusers"] = _totals(their_step(family, path, counts))
    return found


def _totals(counts: Counts) -> dict[str, int]:
    totals = counts.totals()
    return {kind: totals[kind] for kind in ("launches", "syncs", "copies", "mixes")}


def main() -> None:
    """Count all families that were asked for, and print the table as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", action="append", choices=tuple(FAMILIES), help="one of them; more than once")
    parser.add_argument("--json-out", type=Path, help="file, or folder for launches.json")
    options = parser.parse_args()
    shape = {"layers": 2, "dtype": DTYPE, "steps": STEPS}
    result: dict[str, Any] = {"benchmark": "launches", **environment(), **shape, "families": {}}
    for name in options.family or FAMILIES:
        sys.stderr.write(f"{name} ...\n")
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            result["families"][name] = pool.submit(measure, name).result()
    report(result, "launches", options.json_out)


if __name__ == "__main__":
    main()
