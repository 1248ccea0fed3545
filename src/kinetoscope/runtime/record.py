"""The replay record: everything that decided a video's bytes, as JSON inside the file."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor

from kinetoscope.core.types import ForwardBatch
from kinetoscope.core.version import __version__
from kinetoscope.engine.hooks import Interceptor
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.runtime.device import dtype_name

FORMAT = 2


def versions() -> dict[str, str]:
    """The software that computes the video."""
    return {
        "kinetoscope": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def frames_digest(frames: Any) -> str:
    """SHA-256 of a uint8 [T, H, W, 3] array."""
    return hashlib.sha256(frames.tobytes()).hexdigest()


def make_record(
    pipeline: ComposedPipeline,
    options: Mapping[str, Any],
    batch: ForwardBatch,
    index: int,
    given: Mapping[str, Tensor],
    digest: str | None = None,
) -> dict[str, Any]:
    """The record of sample `index` of a finished batch.

    Samples of one batch are computed together, and the last bits of a sum may depend on its neighbours; so the record
    holds the whole batch, and replay repeats it.

    Args:
        given: latents, images and videos that the caller gave, by name; a record can name but not hold them.
        digest: of the frames (`frames_digest`), where the batch does not hold them.
    """
    cache = str(options.get("cache") or "").partition(":")[0]  # made again from the option
    return {
        "format": FORMAT,
        "prompt": batch.prompts[index],
        "seed": batch.seeds[index],
        "model": pipeline.model.name,
        "model_hash": pipeline.model.fingerprint(),
        "params": {k: v for k, v in asdict(batch.params).items() if v is not None},
        "batch": {
            "index": index,
            "prompts": batch.prompts,
            "negative_prompts": batch.negative_prompts,
            "seeds": batch.seeds,
        },
        "given": {k: hashlib.sha256(v.float().cpu().numpy().tobytes()).hexdigest() for k, v in given.items()},
        "options": dict(options),
        "device": str(pipeline.args.device),
        "dtype": dtype_name(pipeline.args.dtype),
        "threads": torch.get_num_threads(),
        "interceptors": [
            h.name
            for h in [*pipeline.hooks, *batch.hooks]
            if isinstance(h, Interceptor) and h.name != cache and not h.from_options
        ],
        "changed": pipeline.changes(),
        "versions": versions(),
        "frames_sha256": digest or frames_digest(batch.frames[index]),
    }
