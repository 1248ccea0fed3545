"""What the engine costs beyond network, guidance and scheduler arithmetic: `python -m benchmarks.engine_overhead`.

A network that returns a ready tensor, flow-match Euler, a 16x5x16x16 latent, guidance on, no hooks. The same network
calls, guidance and scheduler steps are timed in a bare loop, and the difference a step is the engine's (rows, events,
context and the strategy's bookkeeping).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import cores, environment, pairs, report, seconds
from kinetoscope.core.types import ExecutionArgs, ForwardBatch, SamplingParams
from kinetoscope.diffusion.guidance import COND, UNCOND, Guidance
from kinetoscope.diffusion.noise import generator_for, randn
from kinetoscope.diffusion.scheduler import SchedulerAdapter
from kinetoscope.engine.engine import DenoisingEngine
from kinetoscope.engine.strategies.standard import StandardStrategy

LATENT = (1, 16, 5, 16, 16)
STEPS = 50
GUIDANCE = 5.0


class ReadyNetwork:
    """A transformer without arithmetic; its run-constant parts have the shape of a small one's."""

    def __init__(self) -> None:
        self.outputs = {rows: randn((rows, *LATENT[1:]), generator_for(rows)) for rows in (1, 2)}

    def __call__(self, latents: Tensor, timestep: Tensor, **conditioning: Any) -> Tensor:
        return self.outputs[latents.shape[0]]

    def prepare_conditioning(self, *, encoder_hidden_states: Tensor, text_lengths: Tensor | None) -> dict[str, Any]:
        rows = encoder_hidden_states.shape[0]
        return {
            "text": ([torch.zeros(rows, 8, 2, 4) for _ in range(6)], [torch.zeros(rows, 8, 2, 4) for _ in range(6)])
        }

    def prepare_timesteps(self, timesteps: Tensor) -> dict[str, Any]:
        return {"modulation": (torch.zeros(len(timesteps), 6, 8),)}

    def prepare_shared(self, latent_shape: Sequence[int]) -> dict[str, Any]:
        return {"rope": torch.zeros(4)}


class Parts:
    """What the strategy needs."""

    def __init__(self) -> None:
        self.transformer = ReadyNetwork()
        self.scheduler = SchedulerAdapter("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})


@torch.no_grad()
def overhead(cfg: str, count: int) -> dict[str, Any]:
    """Time a step of engine and bare loop, and the median difference over `count` pairs, in microseconds."""
    parts = Parts()
    args = ExecutionArgs(cfg=cfg)
    latents = randn(LATENT, generator_for(0))
    text = torch.zeros(1, 512, 8)
    guidance = Guidance(GUIDANCE)
    engine = DenoisingEngine(StandardStrategy(parts))

    def engine_run() -> float:
        params = SamplingParams(num_inference_steps=STEPS, guidance_scale=GUIDANCE)
        batch = ForwardBatch(params, [""], [""], [0], latents=latents)
        batch.prompt_embeds = batch.negative_embeds = text
        batch.prompt_lengths = batch.negative_lengths = torch.tensor([5])
        state = engine.strategy.prepare(batch, args)

        def run() -> None:
            for _ in engine.iterate(state):
                pass

        return seconds(run)

    def bare_run() -> float:
        schedule = parts.scheduler.start(STEPS)
        network = parts.transformer
        both = latents.expand(2, *LATENT[1:])

        def run() -> None:
            sample = latents
            for index in range(STEPS):
                timestep = schedule.timesteps[index]
                if cfg == "sequential":
                    uncond, cond = network(sample, timestep), network(sample, timestep)
                else:
                    uncond, cond = network(both, timestep).chunk(2)
                sample = schedule.step(guidance.combine({UNCOND: uncond, COND: cond}), index, sample)

        return seconds(run)

    taken = pairs(engine_run, bare_run, count)
    return {
        "engine_us_a_step": taken["first_s"] / STEPS * 1e6,
        "bare_us_a_step": taken["second_s"] / STEPS * 1e6,
        "overhead_us_a_step": taken["difference_s"] / STEPS * 1e6,
        "pairs": count,
    }


def main() -> None:
    """Run both execution plans of guidance."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=41)
    parser.add_argument("--threads", type=int, default=min(2, cores()))
    parser.add_argument("--json-out", type=Path, help="file, or folder for engine_overhead.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"benchmark": "engine_overhead", **environment(), "latent": LATENT, "steps": STEPS}
    for cfg in ("auto", "sequential"):
        result[cfg] = overhead(cfg, options.pairs)
    report(result, "engine_overhead", options.json_out)


if __name__ == "__main__":
    main()
