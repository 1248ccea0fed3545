"""A tiny random directory of each family, and a request it serves, for what must hold in every family."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kinetoscope import VideoGenerator
from models.tiny_cosmos import make_tiny_cosmos, without_torchvision
from models.tiny_hunyuan import make_tiny_hunyuan
from models.tiny_hunyuan15 import make_tiny_hunyuan15
from models.tiny_ltx import make_tiny_ltx
from models.tiny_skyreels import make_tiny_skyreels
from tiny import make_tiny_wan

LONGCAT = Path(__file__).parents[1] / "fixtures" / "longcat" / "model"
SHORT, LONG = "a cat", "a red circle moving left on black " * 5


@dataclass(frozen=True)
class Family:
    """How to make a directory, and what to ask of it."""

    make: Callable[[Path], Any]
    fields: dict[str, Any] = field(default_factory=dict[str, Any])

    def request(self, **more: Any) -> dict[str, Any]:
        """Fields of `generate_video`."""
        small = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 2, "seed": 3}
        small["negative_prompt"] = "a"  # as short as the shortest prompt: the longest text of a run is the prompt's
        return small | self.fields | more


def make_causal(path: Path) -> None:
    """Causal Wan as self-forcing models are published."""
    make_tiny_wan(path)
    edit(path / "model_index.json", _class_name="WanCausalDMDPipeline")
    edit(path / "model_index.json", transformer=["diffusers", "CausalWanTransformer3DModel"])
    edit(path / "transformer" / "config.json", _class_name="CausalWanTransformer3DModel", num_frames_per_block=1)
    edit(path / "model_index.json", scheduler=["diffusers", "SelfForcingFlowMatchScheduler"])


def make_cosmos(path: Path) -> None:
    """Cosmos Predict 1, text to world."""
    with ExitStack() as stack:
        stack.enter_context(without_torchvision())
        make_tiny_cosmos(path, "CosmosTextToWorldPipeline")


def edit(file: Path, **values: Any) -> None:
    """Change fields of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


FAMILIES: dict[str, Family] = {
    "wan": Family(lambda p: make_tiny_wan(p, layers=3)),
    "wan-a14b": Family(lambda p: make_tiny_wan(p, kind="a14b")),
    "causal": Family(make_causal, {"num_inference_steps": None}),
    "skyreels": Family(lambda p: make_tiny_skyreels(p, "SkyReelsV2DiffusionForcingPipeline")),
    "cosmos": Family(make_cosmos),
    "hunyuan": Family(make_tiny_hunyuan),
    "hunyuan15": Family(make_tiny_hunyuan15),
    "ltx": Family(make_tiny_ltx),
    "longcat": Family(lambda p: shutil.copytree(LONGCAT, p, dirs_exist_ok=True)),
}


def open_family(name: str, path: Path, **options: Any) -> VideoGenerator:
    """A generator of the family in float32 on the CPU; the directory is made if there is none."""
    if not path.exists():
        path.mkdir(parents=True)
        FAMILIES[name].make(path)
    return VideoGenerator.from_pretrained(path, device="cpu", dtype="float32", **options)
