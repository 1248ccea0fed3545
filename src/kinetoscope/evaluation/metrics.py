"""Measures of one video against another, and of a video against its prompt."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]
Distance = Callable[[Array, Array], float]
"""Of two videos uint8 [T, H, W, 3]; 0 is equal."""

LPIPS_BACKBONE = "alexnet-owt-7be5be79.pth"
LPIPS_BATCH = 8


def squared_error(a: Array, b: Array) -> float:
    """Mean squared difference of two uint8 videos, in grey levels squared."""
    total = sum(float(np.square(x.astype(np.float64) - y).sum()) for x, y in zip(a, b, strict=True))
    return total / a.size


def psnr(error: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error of 8-bit pixels; infinite for equal ones."""
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def latent_difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Largest and root-mean-square difference of two samples, in standard deviations of the first."""
    a, b = a.double(), b.double()
    difference, std = (a - b).abs(), float(a.std())
    values = float(difference.max()), float(difference.square().mean().sqrt())
    return (values[0] / std, values[1] / std) if std > 0 else values


def lpips_distance(hub: Path | None = None) -> tuple[Distance | None, str]:
    """LPIPS (Zhang et al. 2018, version 0.1, AlexNet), where package and weights are on this machine.

    Nothing is downloaded.

    Args:
        hub: where torch keeps downloaded weights; None: its own folder.

    Returns:
        the distance (mean over frames), or None and why.
    """
    if find_spec("lpips") is None:
        return None, "the package lpips is not installed"
    weights = (hub or Path(torch.hub.get_dir())) / "checkpoints" / LPIPS_BACKBONE
    if not weights.is_file():
        return None, f"its weights are not on this machine ({weights})"
    import lpips  # pyright: ignore[reportMissingImports]

    network = lpips.LPIPS(net="alex", verbose=False).eval()

    @torch.no_grad()
    def distance(a: Array, b: Array) -> float:
        parts = [
            network(_signed(a[i : i + LPIPS_BATCH]), _signed(b[i : i + LPIPS_BATCH])).flatten()
            for i in range(0, len(a), LPIPS_BATCH)
        ]
        return float(torch.cat(parts).mean())

    return distance, ""


def _signed(frames: Array) -> Tensor:
    """uint8 [T, H, W, 3] -> float32 [T, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 127.5 - 1


def named_attributes(world: Any, prompt: str) -> dict[str, str]:
    """What a prompt asks for in the terms of a world: attribute -> value, of those it names once, in canonical words.

    "A red circle moving left" names colour, shape and motion; other wordings of a value are not understood, and an
    attribute that is named twice is left out.
    """
    text = " ".join(re.findall(r"\w+", prompt.lower()))
    found: dict[str, str] = {}
    for attribute, values in world.attributes.items():
        hits = [v for v in values if re.search(rf"\b{re.escape(v)}\b", text)]
        if len(hits) == 1:
            found[attribute] = hits[0]
    return found


def judge(world: Any, prompt: str, frames: Array) -> dict[str, bool]:
    """Of each attribute that the prompt names: does the video show it?"""
    wanted = named_attributes(world, prompt)
    if not wanted:
        return {}
    seen = world.judge(frames)
    return {name: seen[name] == value for name, value in wanted.items()}
