"""What `kinetoscope info` plans of memory, against what a run makes: `python -m benchmarks.memory`.

Weights by component, as they are and in 8 bits; one forward; a decode in each mode. What options change of the video,
and how long they take, is `benchmarks.settings`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.measure import environment, report
from kinetoscope import VideoGenerator
from kinetoscope.core.types import SamplingParams
from kinetoscope.pipelines.stages.decoding import VAE_MODES
from kinetoscope.runtime.memory import PeakMemory
from kinetoscope.runtime.plan import plan_run

LOSSY = ("int8", "int8-dynamic", "fp8")
"""Kinds of 8-bit weights that a CPU computes."""


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


def main() -> None:
    """Measure all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny-t2v", help="embedded name or directory")
    parser.add_argument("--json-out", type=Path, help="file, or folder for memory.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "benchmark": "memory", **environment(), "model": options.model,
        "model_hash": open_model(options.model).pipeline.model.fingerprint(),
        **plans(options.model, "a small red circle moving left on a black background"),
    }  # fmt: skip
    report(result, "memory", options.json_out)


if __name__ == "__main__":
    main()
