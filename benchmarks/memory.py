"""What 8-bit weights, offload, decoding modes and compiling cost and change: `python -m benchmarks.memory`.

Three parts. *plan*: what `kinetoscope info` says of weights, of a forward and of a decode, against what a run makes.
*lossy*: latents and frames with 8-bit weights against the same videos without. *time*: denoising seconds in alternating
pairs with the plain generator; compiling is timed after a first video that is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.measure import environment, pairs, report
from kinetoscope import VideoGenerator
from kinetoscope.core.types import SamplingParams
from kinetoscope.evaluation import heldout_specs
from kinetoscope.evaluation.ssim import similarity
from kinetoscope.pipelines.stages.decoding import VAE_MODES
from kinetoscope.runtime.memory import PeakMemory
from kinetoscope.runtime.plan import plan_run
from kinetoscope.runtime.settings import parse_configuration
from kinetoscope.worlds import get_world

LOSSY = ("int8", "int8-dynamic", "fp8")
"""Kinds of 8-bit weights that a CPU computes."""
SETTINGS = ("quantize=int8", "quantize=fp8", "offload=blocks", "compile=default")
"""Not int8-dynamic: without 8-bit instructions a processor takes 16 times as long for it. Ask for it by --settings."""


def tensor_bytes(value: Tensor) -> int:
    """Of a tensor, or of what a quantized one is made of."""
    if not hasattr(value, "__tensor_flatten__"):
        return value.numel() * value.element_size()
    return sum(tensor_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])


def open_model(model: str, **options: Any) -> VideoGenerator:
    """The model in float32 on the CPU."""
    return VideoGenerator.from_pretrained(model, device="cpu", dtype="float32", **options)


def plans(model: str, prompt: str) -> dict[str, Any]:
    """Planned over measured: weights by component and kind, one forward, a decode in each mode."""
    found: dict[str, Any] = {"weights": {}, "decoding": {}}
    for kind in (None, *LOSSY):
        generator = open_model(model, quantize=kind)
        for name, planned in plan_run(generator, SamplingParams()).memory.weights.items():
            parts = {p.data_ptr() or id(p): p for p in generator.pipeline.get_module(name).parameters()}
            measured = sum(map(tensor_bytes, parts.values()))
            found["weights"][f"{name} {kind or 'as it is'}"] = {"bytes": measured, "planned_over": planned / measured}
    for mode in VAE_MODES:
        generator = open_model(model, vae=mode)
        vae = generator.pipeline.get_module("vae")
        plan = plan_run(generator, SamplingParams())
        latents = torch.zeros(plan.latent_shape)
        stage: Any = generator.pipeline.stages["decoding"]
        with torch.no_grad(), PeakMemory([*vae.parameters(), *vae.buffers(), latents]) as memory:
            stage.decode(latents)
        planned = plan.memory.decoding
        found["decoding"][mode] = {"bytes": memory.peak, "planned_over": planned and planned / memory.peak}
    generator = open_model(model)
    transformer = generator.pipeline.get_module("transformer")
    peaks: list[int] = []
    forward = transformer.forward

    def measured_forward(*args: Any, **kwargs: Any) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        with PeakMemory([*transformer.parameters(), *transformer.buffers(), *given]) as memory:
            result = forward(*args, **kwargs)
        peaks.append(memory.peak)
        return result

    transformer.forward = measured_forward
    generator.generate_video(prompt, num_inference_steps=1)
    planned = plan_run(generator, SamplingParams()).activation_bytes
    found["forward"] = {"bytes": max(peaks), "planned_over": planned / max(peaks)}
    return found


def compare(plain: VideoGenerator, other: VideoGenerator, prompts: list[str], steps: int, rounds: int) -> Any:
    """How far latents and frames are apart, and the ratio of denoising times (plain / other)."""
    apart: list[float] = []
    ssim: list[float] = []
    ratios: list[float] = []
    for seed, prompt in enumerate(prompts):
        last: dict[str, Any] = {}

        def one(
            name: str, generator: VideoGenerator, seed: int = seed, prompt: str = prompt, last: Any = last
        ) -> float:
            last[name] = generator.generate_video(prompt, seed=seed, num_inference_steps=steps)
            return last[name].timings["denoising"]

        if rounds:
            taken = pairs(lambda one=one: one("plain", plain), lambda one=one: one("other", other), rounds)
            ratios.append(taken["ratio"])
        else:
            one("plain", plain), one("other", other)
        a, b = last["plain"], last["other"]
        apart.append(float((a.latents - b.latents).abs().max() / a.latents.std()))
        alike = similarity(a.frames, b.frames).ssim
        assert alike is not None
        ssim.append(float(alike.mean()))
    return {
        "speedup": statistics.median(ratios) if ratios else None,
        "largest_latent_difference_in_std": max(apart),
        "ssim_median": statistics.median(ssim),
        "ssim_worst": min(ssim),
    }


def main() -> None:
    """Measure everything that a CPU can."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny-t2v", help="embedded name or directory")
    parser.add_argument("--videos", type=int, default=6)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--pairs", type=int, default=3, help="pairs a video; 0: nothing is timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--settings", nargs="*", default=SETTINGS, help="options to compare, NAME=VALUE")
    parser.add_argument("--json-out", type=Path, help="file, or folder for memory.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    plain = open_model(options.model)
    world = get_world(plain.pipeline.model.sidecar["world"])
    prompts = [spec.caption() for spec in heldout_specs(world, options.videos, 0)]
    result: dict[str, Any] = {
        "benchmark": "memory", **environment(), "model": options.model,
        "model_hash": plain.pipeline.model.fingerprint(), "steps": options.steps, "videos": options.videos,
        "plan": plans(options.model, prompts[0]), "options": {},
    }  # fmt: skip
    for setting in options.settings:
        sys.stderr.write(f"{setting} ...\n")
        other = open_model(options.model, **parse_configuration(setting).options)
        result["options"][setting] = compare(plain, other, prompts, options.steps, options.pairs)
    report(result, "memory", options.json_out)


if __name__ == "__main__":
    main()
