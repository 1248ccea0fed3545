"""Side by side with diffusers' WanPipeline on the same weights, in one process: `python -m benchmarks.vs_diffusers`.

Two parts. `mid`: a random Wan of 12 layers and 768 channels at 2,025 tokens, one denoising step with guidance, in
bfloat16 and float32. `embedded`: the model of the package, its denoising and a video end to end. Ratios are diffusers'
time over ours.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import cores, environment, gemm_peak, pairs, report, seconds, wan_flops
from kinetoscope import VideoGenerator
from kinetoscope.attention import capabilities, resolve_attention
from kinetoscope.core.types import ExecutionArgs, ForwardBatch, SamplingParams
from kinetoscope.diffusion.noise import generator_for, randn
from kinetoscope.diffusion.scheduler import SchedulerAdapter
from kinetoscope.models.wan.config import WanConfig
from kinetoscope.models.wan.transformer import WanTransformer3DModel
from kinetoscope.pipelines.stages import DenoisingStage
from kinetoscope.runtime.doctor import slow_dtypes

MID = {
    "num_attention_heads": 12,
    "attention_head_dim": 64,
    "ffn_dim": 3072,
    "num_layers": 12,
    "text_dim": 768,
    "freq_dim": 256,
}
MID_LATENT = (16, 9, 30, 30)  # 33 frames of 240x240: 9 x 15 x 15 = 2,025 tokens
MID_TEXT = {"cond": 40, "uncond": 120}  # true lengths: a sentence, and a negative prompt as long as the published one
MID_STEPS = 2
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
PROMPT, NEGATIVE = "a red circle moving left on a black background", ""


def mid_size(dtype: torch.dtype, count: int) -> dict[str, Any]:
    """Time of a denoising step (two branches, UniPC) through both, and how far the results are apart."""
    oracle = diffusers.WanTransformer3DModel(**MID).eval().requires_grad_(False)
    generator = generator_for(0)
    for parameter in oracle.parameters():
        parameter += 0.02 * randn(parameter.shape, generator)
    ours = WanTransformer3DModel(WanConfig.from_dict(dict(oracle.config))).eval().requires_grad_(False)
    ours.load_state_dict(oracle.state_dict())
    low_oracle = _in_dtype(oracle, dtype, set(oracle._keep_in_fp32_modules))
    low_ours = _in_dtype(ours, dtype, set(ours.keep_in_float32))

    pipeline = diffusers.WanPipeline(None, None, None, diffusers.UniPCMultistepScheduler(**FLOW), low_oracle)
    pipeline.set_progress_bar_config(disable=True)
    table = resolve_attention("auto", capabilities("cpu", dtype), ("self", "cross"))
    latents = randn((1, *MID_LATENT), generator)
    text = {branch: _padded(length, MID["text_dim"], generator) for branch, length in MID_TEXT.items()}
    _, frames, height, width = MID_LATENT
    size = {"height": 8 * height, "width": 8 * width, "num_frames": 4 * frames - 3}

    def theirs_run() -> Tensor:
        return pipeline(
            prompt_embeds=text["cond"],
            negative_prompt_embeds=text["uncond"],
            latents=latents,
            num_inference_steps=MID_STEPS,
            guidance_scale=5.0,
            output_type="latent",
            **size,
        ).frames

    def our_run(model: WanTransformer3DModel = low_ours, dtype: torch.dtype = dtype) -> Tensor:
        params = SamplingParams(num_inference_steps=MID_STEPS, guidance_scale=5.0, **size)
        batch = ForwardBatch(params, [""], [""], [0], latents=latents)
        batch.prompt_embeds, batch.prompt_lengths = text["cond"], torch.tensor([MID_TEXT["cond"]])
        batch.negative_embeds, batch.negative_lengths = text["uncond"], torch.tensor([MID_TEXT["uncond"]])
        stage = DenoisingStage(model, SchedulerAdapter("UniPCMultistepScheduler", FLOW))
        result = drain(stage.iterate(batch, ExecutionArgs(dtype=dtype, attention=table))).latents
        assert result is not None
        return result

    exact = our_run(ours, torch.float32)
    drift = {"diffusers": _distance(theirs_run(), exact), "ours": _distance(our_run(), exact)}
    taken = pairs(lambda: seconds(theirs_run) / MID_STEPS, lambda: seconds(our_run) / MID_STEPS, count)
    tokens = frames * height * width // 4
    peak = gemm_peak(dtype)
    kept = -(-(max(MID_TEXT.values()) + 1) // 32) * 32
    return {
        "latent": MID_LATENT,
        "tokens": tokens,
        "text_tokens": 512,
        "text_lengths": MID_TEXT,
        "steps": MID_STEPS,
        "step": _compared(taken),
        "gemm_peak_gflops": peak / 1e9,
        "diffusers_fraction_of_peak": 2 * wan_flops(ours.config, tokens, 512) / taken["first_s"] / peak,
        "ours_fraction_of_peak": 2 * wan_flops(ours.config, tokens, kept) / taken["second_s"] / peak,
        "relative_distance_to_our_float32": drift,
        "attention": str(table),
    }


def embedded(model: str, dtype: str, count: int) -> dict[str, Any]:
    """Denoising alone, and prompt to frames, of a model directory through both."""
    ours = VideoGenerator.from_pretrained(model, device="cpu", dtype=dtype)
    path = ours.pipeline.model.path
    pipeline = diffusers.WanPipeline.from_pretrained(path)
    if dtype == "bfloat16":
        pipeline.transformer = _in_dtype(
            pipeline.transformer, torch.bfloat16, set(pipeline.transformer._keep_in_fp32_modules)
        )
    pipeline.set_progress_bar_config(disable=True)
    defaults = ours.defaults()
    fields = {
        "height": defaults.height,
        "width": defaults.width,
        "num_frames": defaults.num_frames,
        "num_inference_steps": defaults.num_inference_steps,
        "guidance_scale": defaults.guidance_scale,
    }
    with torch.no_grad():
        embeds = dict(
            zip(("prompt_embeds", "negative_prompt_embeds"), pipeline.encode_prompt(PROMPT, NEGATIVE), strict=True)
        )
    timings: dict[str, float] = {}
    prompts = (f"{PROMPT} {index}" for index in itertools.count())  # always a new one: ours remembers encoded prompts

    def theirs_latents() -> Tensor:
        return pipeline(**embeds, **fields, generator=generator_for(0), output_type="latent").frames

    def theirs_video(prompt: str) -> Any:
        return pipeline(prompt, NEGATIVE, **fields, generator=generator_for(0), output_type="np").frames

    def our_video(prompt: str) -> Any:
        return ours.generate_video(prompt, NEGATIVE, seed=0)

    def our_denoising() -> float:
        timings.update(our_video(next(prompts)).timings)
        return timings["denoising"]

    expected, result = theirs_video(PROMPT)[0], our_video(PROMPT)
    difference = np.abs(np.round(expected * 255) - result.frames).max()
    denoising = pairs(lambda: seconds(theirs_latents), our_denoising, count)
    end_to_end = pairs(
        lambda: seconds(lambda: theirs_video(next(prompts))), lambda: seconds(lambda: our_video(next(prompts))), count
    )
    return {
        "model": model,
        "dtype": dtype,
        "request": fields,
        "scheduler": type(pipeline.scheduler).__name__,
        "denoising": _compared(denoising),
        "end_to_end": _compared(end_to_end),
        "our_stages_s": timings,
        "max_grey_level_difference": float(difference),
    }


def _compared(taken: dict[str, Any]) -> dict[str, Any]:
    """`pairs` of diffusers and ours, under those names."""
    return {
        "diffusers_s": taken["first_s"],
        "ours_s": taken["second_s"],
        "ratio": taken["ratio"],
        "ratio_range": taken["ratio_range"],
        "pairs": taken["pairs"],
    }


def _distance(latents: Tensor, exact: Tensor) -> float:
    """|latents - exact| / |exact|"""
    return ((latents.float() - exact).norm() / exact.norm()).item()


def drain(events: Generator[Any, None, ForwardBatch]) -> ForwardBatch:
    """The return value of a generator of events."""
    while True:
        try:
            next(events)
        except StopIteration as stop:
            return stop.value


def _in_dtype(module: Any, dtype: torch.dtype, keep: set[str]) -> Any:
    """A copy in `dtype`, but for parameters below a module named in `keep` (the published policy) and for buffers."""
    module = copy.deepcopy(module)
    for name, parameter in module.named_parameters():
        if not keep & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return module


def _padded(length: int, dim: int, generator: torch.Generator) -> Tensor:
    """[1, 512, dim] text embeddings, zero beyond `length`."""
    text = randn((1, 512, dim), generator)
    text[:, length:] = 0
    return text


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("all", "mid", "embedded"), default="all")
    parser.add_argument("--model", default="tiny-t2v", help="model of the embedded part: name or directory")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=min(2, cores()))
    parser.add_argument("--json-out", type=Path, help="file, or folder for vs_diffusers.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"benchmark": "vs_diffusers", **environment()}
    parts: dict[str, Callable[[], dict[str, Any]]] = {}
    if options.part in ("all", "mid"):
        parts["mid_bfloat16"] = lambda: mid_size(torch.bfloat16, options.pairs)
        parts["mid_float32"] = lambda: mid_size(torch.float32, options.pairs)
    if options.part in ("all", "embedded"):
        parts["embedded_float32"] = lambda: embedded(options.model, "float32", options.pairs)
        parts["embedded_bfloat16"] = lambda: embedded(options.model, "bfloat16", options.pairs)
    for name, run in parts.items():
        slow = slow_dtypes(torch.device("cpu")).get(name.partition("_")[2])
        if slow:
            sys.stderr.write(f"{name} left out: {slow}\n")
            continue
        sys.stderr.write(f"{name} ...\n")
        result[name] = run()
    report(result, "vs_diffusers", options.json_out)


if __name__ == "__main__":
    main()
