"""What is run on the pretend device: a row for each family, solver, step cache, guidance, plan and VAE mode.

`measure_rows` is the program of a process of its own, since the pretend device is registered for a whole process.
"""

from __future__ import annotations

import json
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.pretend_device import DEVICE, Counts, pretend_device

from kinetoscope import VideoGenerator
from kinetoscope.loading import resolve_model
from kinetoscope.runtime.caches import CALIBRATION, network_digest
from models.tiny_cosmos import make_tiny_cosmos, without_torchvision
from models.tiny_hunyuan import make_tiny_hunyuan_i2v
from models.tiny_hunyuan15 import make_tiny_hunyuan15
from models.tiny_ltx import make_tiny_ltx
from models.tiny_skyreels import make_tiny_skyreels
from pipelines.test_matrix_game import make_world
from runtime.families import FAMILIES, SHORT, edit
from tiny import make_tiny_wan

SMALL: dict[str, Any] = {
    "height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 3, "seed": 3, "negative_prompt": "a"
}  # fmt: skip
PICTURE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
CLIP = np.random.default_rng(1).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
IMAGE: dict[str, Any] = {"image": PICTURE}


@dataclass(frozen=True)
class Row:
    """One generator and what it is asked.

    Attributes:
        model: key of `MODELS`.
        fields: of `generate_video`.
        options: of `VideoGenerator.from_pretrained`.
        prompts: how many videos are made together.
        syncs: largest number of synchronisations in a step.
        reads: largest number of synchronisations in the decoding of all frames.
        lora: whether a LoRA is loaded.
        same: compare with the CPU.
    """

    model: str
    fields: dict[str, Any] = field(default_factory=dict[str, Any])
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    prompts: int = 1
    syncs: int = 0
    reads: int = 1
    lora: bool = False
    same: bool = True


def make_few_step(path: Path, kind: str = "t2v") -> None:
    """A Wan directory of a DMD student."""
    make_tiny_wan(path, kind=kind)
    edit(path / "model_index.json", _class_name="WanDMDPipeline" if kind == "t2v" else "WanImageToVideoDmdPipeline")


def make_cosmos(path: Path, kind: str) -> None:
    """A Cosmos directory of a kind."""
    with without_torchvision():
        make_tiny_cosmos(path, kind)


def make_played(path: Path, name: str) -> None:
    """A Matrix-Game directory with keyboard and mouse, of a pipeline class."""
    make_world(path, "base")
    edit(path / "model_index.json", _class_name=name)


MODELS: dict[str, Callable[[Path], Any]] = {
    **{name: family.make for name, family in FAMILIES.items()},
    "wan-two-layers": make_tiny_wan,
    "wan-i2v": partial(make_tiny_wan, kind="i2v"),
    "wan-flf2v": partial(make_tiny_wan, kind="flf2v"),
    "wan-i2v-a14b": partial(make_tiny_wan, kind="i2v-a14b"),
    "wan-ti2v": partial(make_tiny_wan, kind="ti2v"),
    "fast-wan": make_few_step,
    "fast-wan-i2v": partial(make_few_step, kind="i2v"),
    "skyreels-t2v": partial(make_tiny_skyreels, pipeline="SkyReelsV2Pipeline"),
    "skyreels-i2v": partial(make_tiny_skyreels, pipeline="SkyReelsV2DiffusionForcingImageToVideoPipeline"),
    "cosmos1-video": partial(make_cosmos, kind="CosmosVideoToWorldPipeline"),
    "cosmos2-image": partial(make_cosmos, kind="Cosmos2TextToImagePipeline"),
    "cosmos2-video": partial(make_cosmos, kind="Cosmos2VideoToWorldPipeline"),
    "cosmos2.5": partial(make_cosmos, kind="Cosmos2_5_PredictBasePipeline"),
    "hunyuan-i2v-concat": partial(make_tiny_hunyuan_i2v, kind="latent_concat"),
    "hunyuan-i2v": partial(make_tiny_hunyuan_i2v, kind="token_replace"),
    "hunyuan15-i2v": partial(make_tiny_hunyuan15, image=True),
    "ltx-i2v": partial(make_tiny_ltx, image=True),
    "ltx-timed": partial(make_tiny_ltx, timed=True),
    "matrix-game": partial(make_played, name="MatrixGame2CausalDMDPipeline"),
    "matrix-game-foundation": partial(make_played, name="MatrixGame2I2VPipeline"),
}

FEW: dict[str, Any] = {"num_inference_steps": None}
LONG: dict[str, Any] = {"num_frames": 17, "base_num_frames": 9, "overlap_history": 5, "addnoise_condition": 20}
FAMILY_ROWS: dict[str, Row] = {
    "wan": Row("wan"),
    "wan-i2v": Row("wan-i2v", IMAGE),
    "wan-flf2v": Row("wan-flf2v", {**IMAGE, "last_image": PICTURE}),
    "wan-v2v": Row("wan", {"video": CLIP, "strength": 0.7}),
    "wan-a14b": Row("wan-a14b"),
    "wan-i2v-a14b": Row("wan-i2v-a14b", IMAGE),
    "wan-ti2v": Row("wan-ti2v"),
    "wan-ti2v-image": Row("wan-ti2v", IMAGE),
    "fast-wan": Row("fast-wan", FEW),
    "fast-wan-i2v": Row("fast-wan-i2v", {**FEW, **IMAGE}),
    "causal": Row("causal", FEW),
    "skyreels": Row("skyreels"),
    "skyreels-t2v": Row("skyreels-t2v"),
    "skyreels-i2v": Row("skyreels-i2v", {**IMAGE, "addnoise_condition": 20}),
    "skyreels-lag": Row("skyreels", {"ar_step": 1}),
    "skyreels-long": Row("skyreels", LONG),
    "cosmos1": Row("cosmos", {"num_frames": 17}),
    "cosmos1-video": Row("cosmos1-video", {"num_frames": 17, **IMAGE}),
    "cosmos2-image": Row("cosmos2-image", {"num_frames": 1}),
    "cosmos2-video": Row("cosmos2-video", IMAGE),
    "cosmos2.5": Row("cosmos2.5", IMAGE),
    "hunyuan": Row("hunyuan", {"true_cfg_scale": 2.0}),
    "hunyuan-i2v": Row("hunyuan-i2v", IMAGE),
    "hunyuan-i2v-concat": Row("hunyuan-i2v-concat", IMAGE),
    "hunyuan15": Row("hunyuan15"),
    "hunyuan15-i2v": Row("hunyuan15-i2v", IMAGE),
    "ltx": Row("ltx"),
    "ltx-timed": Row("ltx-timed"),
    "ltx-i2v": Row("ltx-i2v", IMAGE),
    "longcat": Row("longcat"),
    "longcat-i2v": Row("longcat", IMAGE),
    "longcat-continued": Row("longcat", {"video": CLIP, "num_cond_frames": 5, "use_kv_cache": True}),
    "matrix-game": Row("matrix-game", {**FEW, **IMAGE}),
    "matrix-game-foundation": Row("matrix-game-foundation", IMAGE),
}
SOLVERS = {f"solver-{name}": Row("wan", options={"scheduler": name}) for name in ("unipc", "dpm++", "euler", "heun")}
CACHES = {
    "cache-fbcache": Row("wan", options={"cache": "fbcache:threshold=10"}, syncs=1),
    "cache-dbcache": Row("wan", options={"cache": "dbcache:threshold=10,first=1,last=1,warmup=1"}, syncs=1),
    "cache-teacache": Row("wan", options={"cache": "teacache:threshold=10,warmup=1"}, syncs=1),
    "cache-magcache": Row("wan", options={"cache": "magcache:threshold=10"}),
    "cache-taylorseer": Row("wan", options={"cache": "taylorseer:interval=2,warmup=1"}),
    "cache-fbcache-sequential": Row("wan", options={"cache": "fbcache:threshold=10", "cfg": "sequential"}, syncs=2),
    "cache-fbcache-hunyuan": Row("hunyuan", options={"cache": "fbcache:threshold=10"}, syncs=1),
    "cache-fbcache-causal": Row("causal", FEW, {"cache": "fbcache:threshold=10"}, syncs=1),
}
GUIDANCE = {
    f"guidance-{name}": Row("wan", {"guidance": name}, syncs=int("cosine" in name))
    for name in ("cfg:start=0.3", "cfg:cosine=0.99", "cfg:reuse=0.5", "cfg-zero", "apg:eta=0,norm=15,momentum=0.5")
} | {"guidance-rescale": Row("wan", {"guidance_rescale": 0.7})}
PLANS = {
    "cfg-batched": Row("wan", options={"cfg": "batched"}),
    "cfg-sequential": Row("wan", options={"cfg": "sequential"}),
    "two-prompts": Row("wan", prompts=2, reads=2),
    "two-prompts-ltx": Row("ltx", prompts=2, reads=2),
    "true-length": Row("wan", options={"text_mode": "true_length"}),
    "lora": Row("wan-a14b", lora=True),
    "offload-components": Row("wan", options={"offload": "components"}),
    "offload-blocks": Row("wan", options={"offload": "blocks"}),
}
VAE = {
    "vae-tiled": Row("wan", options={"vae": "tiled"}),
    "vae-tiled-ltx": Row("ltx", options={"vae": "tiled"}),
    "vae-streaming": Row("wan", options={"vae": "streaming"}, reads=3),
}
ROWS: dict[str, Row] = FAMILY_ROWS | SOLVERS | CACHES | GUIDANCE | PLANS | VAE


def prepare(name: str, folder: Path) -> Path:
    """The directory of a model, made on first use."""
    path = folder / name
    if not path.exists():
        path.mkdir(parents=True)
        MODELS[name](path)
        if name == "wan":
            measured = {
                "teacache": {"coefficients": [0.0, 1.0]},
                "magcache": {"ratios": {"uncond": [1.0], "cond": [1.0]}},
            }
            known = {"format": 1, "network": network_digest(resolve_model(str(path)))}
            (path / CALIBRATION).write_text(json.dumps(known | measured))
    return path


def fields_of(row: Row) -> dict[str, Any]:
    """Fields of `generate_video`, the prompts among them."""
    fields = {"prompt": SHORT, **SMALL, **FAMILIES.get(row.model, FAMILIES["wan"]).fields, **row.fields}
    if row.model.startswith("matrix-game"):
        del fields["negative_prompt"]
    if row.prompts > 1:
        fields["prompt"] = [f"{fields['prompt']} {i}" for i in range(row.prompts)]
    return fields


def open_row(row: Row, folder: Path, device: str, dtype: str) -> VideoGenerator:
    """The generator of a row."""
    path = prepare(row.model, folder)
    generator = VideoGenerator.from_pretrained(path, device=device, dtype=dtype, **row.options)
    if row.lora:
        from lora_files import factors, tensors, write

        pairs = factors(1)
        file = write(folder / "lora.safetensors", tensors("diffusers", pairs) | tensors("diffusers-2", pairs))
        generator.load_lora(file)
    return generator


def run(
    generator: VideoGenerator, fields: dict[str, Any], counts: Counts
) -> tuple[list[Any], list[tuple[str, Counts]]]:
    """The results of a run, and what was counted before each of its events."""
    events, seen, before = generator.iterate(**fields), list[tuple[str, Counts]](), counts.copy()
    while True:
        try:
            event = next(events)
        except StopIteration as stop:
            return stop.value, seen
        seen.append((f"{event.kind} {getattr(event, 'stage', '')}".strip(), counts.since(before)))
        before = counts.copy()


def measure(row: Row, folder: Path, counts: Counts, dtype: str) -> dict[str, Any]:
    """What a row does on the pretend device: see the keys."""
    whole = counts.copy()
    generator = open_row(row, folder, DEVICE, dtype)
    fields = fields_of(row)
    if "offload" not in row.options:
        for name in {"transformer", "transformer_2", "vae"} & set(generator.pipeline.model.components()):
            generator.pipeline.get_module(name)  # a load in the run would count as copies
    results, seen = run(generator, fields, counts)
    steps = [c for kind, c in seen if kind == "step"]
    decoding = [c for kind, c in seen if kind == "stage_end decoding"]
    found: dict[str, Any] = {
        "steps": len(steps),
        "mixes": counts.since(whole).mixes,
        "syncs": max(c.syncs.total() for c in steps),
        "copies": max(c.copies.total() for c in steps),
        "launches": max(c.launches.total() for c in steps),
        "reads": sum(c.syncs.total() for c in decoding),
        "decoding_copies": sum(c.copies.total() for c in decoding),
        "places": places(steps + decoding),
    }
    if row.same and dtype == "float32":
        expected = open_row(row, folder, "cpu", dtype).generate_video(**fields)
        many = expected if isinstance(expected, list) else [expected]
        found["difference"] = max(
            float((a.latents - b.latents).abs().max() / b.latents.abs().max())
            for a, b in zip(results, many, strict=True)
        )
    return found


SESSIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "session-matrix-game": ("matrix-game", IMAGE),
    "session-causal": ("causal", {"prompt": SHORT}),
    "session-tiny-world": ("tiny-world", IMAGE),
}
BLOCKS = 7


def measure_session(name: str, folder: Path, counts: Counts, dtype: str) -> dict[str, Any]:
    """What a block of a stream does on the pretend device; every block counts, the first one included."""
    model, given = SESSIONS[name]
    path = prepare(model, folder) if model in MODELS else model
    size = {} if model == "tiny-world" else {"height": 32, "width": 32}
    whole = counts.copy()
    generator = VideoGenerator.from_pretrained(path, device=DEVICE, dtype=dtype)
    made: list[Any] = []
    blocks: list[Counts] = []
    for part in ("transformer", "vae"):
        generator.pipeline.get_module(part)
    with generator.start_session(seed=3, **size, **given) as session:
        for _ in range(BLOCKS):
            before = counts.copy()
            made.append(session.step())
            blocks.append(counts.since(before))
    found: dict[str, Any] = {
        "steps": len(blocks),
        "mixes": counts.since(whole).mixes,
        "syncs": max(c.syncs.total() for c in blocks),
        "copies": max(c.copies.total() for c in blocks),
        "launches": max(c.launches.total() for c in blocks),
        "places": places(blocks),
    }
    if dtype == "float32":
        here = VideoGenerator.from_pretrained(path, device="cpu", dtype=dtype)
        with here.start_session(seed=3, **size, **given) as session:
            frames = [session.step() for _ in range(BLOCKS)]
        found["difference"] = max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(made, frames, strict=True)) / 255
    return found


def limits(name: str) -> dict[str, int]:
    """The largest numbers of a step, and of the decoding of all frames; what is not named is 0."""
    if name in SESSIONS:
        return {"syncs": 1}  # the host reads the frames of each block
    return {"syncs": ROWS[name].syncs, "reads": ROWS[name].reads}


def places(parts: Sequence[Counts]) -> dict[str, int]:
    """Where synchronisations and copies came from."""
    total: Counter[str] = Counter()
    for part in parts:
        total += Counter({f"sync: {k}": n for k, n in part.syncs.items()})
        total += Counter({f"copy: {k}": n for k, n in part.copies.items()})
    return dict(total)


def measure_rows(names: Sequence[str], folder: Path, out: Path, dtypes: Sequence[str]) -> None:
    """Write what each row does in each dtype as JSON, "name dtype" -> counts or the error."""
    import torch

    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with pretend_device() as counts:
        for name in names:
            for dtype in dtypes:
                start = time.perf_counter()
                try:
                    if name in SESSIONS:
                        found[f"{name} {dtype}"] = measure_session(name, folder, counts, dtype)
                    else:
                        found[f"{name} {dtype}"] = measure(ROWS[name], folder, counts, dtype)
                except Exception:
                    found[f"{name} {dtype}"] = {"error": traceback.format_exc()}
                found[f"{name} {dtype}"]["limits"] = limits(name)
                found[f"{name} {dtype}"]["seconds"] = round(time.perf_counter() - start, 2)
    out.write_text(json.dumps(found, indent=1))
