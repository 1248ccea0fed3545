"""Measuring a model once, so that MagCache or TeaCache knows which of its steps may be left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kinetoscope.core.errors import InputError
from kinetoscope.core.spec import one_of
from kinetoscope.engine.hooks.caches import CacheCalibration, fit_coefficients, magnitude_ratios
from kinetoscope.runtime.caches import CALIBRATED, write_calibration
from kinetoscope.runtime.generator import RunEvent, VideoGenerator

PROMPTS = (
    "a fisherman rows across a still lake at dawn while mist lifts from the water",
    "close-up of a potter's hands shaping a bowl on a turning wheel",
    "a tram passes through a busy street in the rain, lights reflected in the puddles",
    "a fox runs through deep snow between dark trees and stops to look back",
)
"""What is measured on where a model is of no world of this package."""


def calibrate(
    generator: VideoGenerator,
    cache: str,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    output: str | Path | None = None,
    on_event: Callable[[RunEvent], None] | None = None,
    **fields: Any,
) -> tuple[Path, dict[str, Any]]:
    """Make one video a prompt with every step computed, and write what `cache` needs to know of the model.

    Guidance, size, steps and schedule should be those of later use: ratios are read at the nearest step where a run
    has another number of them, but they are of this schedule.

    Args:
        generator: the model, opened without a cache.
        cache: "magcache" or "teacache".
        prompts: the more, the less they are of one video; four are enough for most models.
        seed: of the first video; the others have the numbers after it.
        output: instead of `step_caches.json` beside the model.
        fields: of `generate_video`.

    Returns:
        the file and what was measured.

    Raises:
        InputError: an unknown cache; no prompt; too few steps.
    """
    one_of(cache, CALIBRATED, "cache that needs calibration")
    if not prompts:
        raise InputError("calibration needs at least one prompt")
    hook = CacheCalibration()
    steps, results = 0, []
    for number, prompt in enumerate(prompts):
        result = generator.generate_video(
            prompt, seed=seed + number, hooks=[hook], trace=True, on_event=on_event, **fields
        )
        steps = max(record["step"] + 1 for record in result.logging_info["step_trace"])
        results.append(result)
    params = results[0].params
    entry: dict[str, Any] = {
        "videos": len(prompts),
        "seed": seed,
        "steps": steps,
        "size": [params.num_frames, params.height, params.width],
        "guidance_scale": params.guidance_scale,
        "flow_shift": params.flow_shift,
        "scheduler": params.scheduler,
    }
    if cache == "magcache":
        ratios = magnitude_ratios(hook.measured, steps)
        entry["ratios"] = {branch: [round(v, 6) for v in values] for branch, values in ratios.items()}
    else:
        entry["coefficients"], entry["variance_explained"] = fit_coefficients(hook.measured)
    return write_calibration(generator.pipeline.model, cache, entry, output), entry
