"""What each setting changes and costs on the embedded model, through the gate: `python -m benchmarks.settings`.

Every comparison is `kinetoscope ab`'s, over captions that were never trained on; `faster` is the ratio of denoising
times (median of alternating pairs in one process). Where a group says so, figures are of fewer steps.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.measure import environment, report
from kinetoscope.evaluation import heldout_specs
from kinetoscope.loading import resolve_model
from kinetoscope.runtime.ab import ABPlan, compare_configurations, parse_pair
from kinetoscope.worlds import get_world


class Group(NamedTuple):
    """Settings that are compared with the same other one.

    Attributes:
        against: what they are compared with.
        settings: each a configuration of `kinetoscope ab`.
        steps: denoising steps; None: the model's own.
        videos: at most so many; None: as many as asked for.
    """

    against: str
    settings: tuple[str, ...]
    steps: int | None = None
    videos: int | None = None


GROUPS = {
    "exact": Group("cfg=sequential", ("cfg=batched", "vae=streaming", "offload=blocks", "compile=true")),
    "text": Group("", ("text_mode=true_length",)),
    "guidance": Group(
        "",
        ("guidance=cfg:stop=0.5", "guidance=cfg:reuse=0.5", "guidance=cfg:cosine=0.99", "guidance=cfg-zero",
         "guidance=apg:eta=0"),
    ),
    "quantize": Group("", ("quantize=int8", "quantize=fp8")),
    "sparse": Group(
        "",
        (
            "attention=vsa:sparsity=0.25,tile=1,2,2,dense_steps=0.4",
            "attention=vsa:sparsity=0.5,tile=1,2,2,dense_steps=0.4",
            "attention=vsa:sparsity=0.8,tile=1,2,2,dense_steps=0.4",
            "attention=sta:window=2,2,2,tile=3,2,2,dense_steps=0.4",
            "attention=vmoba:threshold=0.6,time=1,space=2,2,both=1,2,2,dense_steps=0.4",
            "attention=sla:sparsity=0.5,query_block=16,key_block=8,dense_steps=0.4",
        ),
    ),
    # A processor without instructions for bfloat16 takes minutes for a video.
    "bfloat16": Group("dtype=bfloat16,cfg=sequential", ("dtype=bfloat16,cfg=batched",), steps=4, videos=1),
}  # fmt: skip


def measure(model: str, a: str, b: str, prompts: Sequence[str], steps: int | None, repeats: int) -> dict[str, Any]:
    """B against A: likeness of the videos, and the ratio of times."""
    fields = {} if steps is None else {"num_inference_steps": steps}
    options = {"device": "cpu"} if "dtype=" in a else {"device": "cpu", "dtype": "float32"}
    plan = ABPlan(*parse_pair(a, b, model), model, options, fields, list(prompts), repeats=repeats)
    compared = compare_configurations(plan).comparison
    found, time, score = compared.measures(), compared.time()["denoising"], compared.following()
    psnr = found["psnr"]["worst"]
    return {
        "a": a,
        "b": b,
        "pairs": len(compared.pairs) * repeats,
        "steps": compared.facts["steps"],
        "ssim": found["ssim"],
        "psnr": psnr if math.isfinite(psnr) else None,
        "latent_difference": found["latent_difference"]["worst"],
        "faster": 1 / time["ratio"],
        "prompt_following": score and [side.value for side in score],
    }


def main() -> None:
    """Measure the groups that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny-t2v", help="embedded name or directory")
    parser.add_argument("--groups", nargs="*", choices=GROUPS, default=list(GROUPS), metavar="GROUP")
    parser.add_argument("--videos", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=1, help="pairs a video")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json-out", type=Path, help="file, or folder for settings.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = resolve_model(options.model)
    prompts = [s.caption() for s in heldout_specs(get_world(model.sidecar["world"]), options.videos, 0)]
    result: dict[str, Any] = {
        "benchmark": "settings", **environment(), "model": options.model, "model_hash": model.fingerprint(),
        "groups": {},
    }  # fmt: skip
    for name in options.groups:
        group = GROUPS[name]
        result["groups"][name] = []
        for setting in group.settings:
            sys.stderr.write(f"{setting} ...\n")
            result["groups"][name].append(
                measure(options.model, group.against, setting, prompts[: group.videos], group.steps, options.repeats)
            )
    report(result, "settings", options.json_out)


if __name__ == "__main__":
    main()
