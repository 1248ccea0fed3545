"""The replay record: everything that decided a video's bytes, as JSON inside the file."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor

from kinetoscope.core.extensions import loaded_extensions
from kinetoscope.core.types import ForwardBatch
from kinetoscope.core.version import __version__
from kinetoscope.engine.hooks import Interceptor
from kinetoscope.loading.directory import file_digest
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.runtime.caches import with_calibration
from kinetoscope.runtime.device import dtype_name

FORMAT = 3
READ = (2, 3)
"""Formats that `replay` reads. A record of format 2 holds the prompts of all videos of its batch, and paths."""


FILE = "file"
"""Key of a parameter that is a file: `{"file": name, "sha256": digest}`."""


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
    joined: int = 1,
) -> dict[str, Any]:
    """Return the record of sample `index` of a finished batch.

    It holds nothing of other videos and no path of this machine: files have their name and SHA-256.

    Args:
        given: latents, images and videos that the caller gave, by name; a record can name but not hold them.
        digest: of the frames (`frames_digest`), where the batch does not hold them.
        joined: videos that were computed together. The last bits of a sum may depend on the neighbours, so above 1
            a replay, which makes the video alone, gives the same frames to rounding only.
    """
    cache = str(options.get("cache") or "").partition(":")[0]  # made again from the option
    return {
        "format": FORMAT,
        "prompt": batch.prompts[index],
        "negative_prompt": batch.negative_prompts[index],
        "seed": batch.seeds[index],
        "model": _file_name(pipeline.model.name),
        "model_hash": pipeline.model.fingerprint(),
        "params": _with_digests({k: v for k, v in asdict(batch.params).items() if v is not None}),
        "joined": joined,
        "given": {k: hashlib.sha256(v.float().cpu().numpy().tobytes()).hexdigest() for k, v in given.items()},
        "options": _portable(options),
        "device": str(pipeline.args.device),
        "dtype": dtype_name(pipeline.args.dtype),
        "threads": torch.get_num_threads(),
        "interceptors": [
            h.name
            for h in [*pipeline.hooks, *batch.hooks]
            if isinstance(h, Interceptor) and h.name != cache and not h.from_options
        ],
        "changed": pipeline.changes(),
        "extensions": [asdict(e) for e in loaded_extensions()],
        "versions": versions(),
        "frames_sha256": digest or frames_digest(batch.frames[index]),
    }


def _portable(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a generator with the names of files instead of their paths."""
    kept = dict(options)
    kept["lora"] = [{**lora, "path": Path(lora["path"]).name} for lora in options.get("lora") or ()]
    if options.get("cache"):
        kept["cache"] = with_calibration(options["cache"], lambda file: Path(file).name)
    return _named_files(kept)


def _file_name(text: str) -> str:
    """Return the last part of an absolute path, and any other text as it is."""
    return Path(text).name if Path(text).is_absolute() else text


def _named_files(value: Any) -> Any:
    """Return parsed JSON with the last part of every absolute path in it."""
    if isinstance(value, str):
        return _file_name(value)
    if isinstance(value, Mapping):
        return {k: _named_files(v) for k, v in value.items()}
    return [_named_files(v) for v in value] if isinstance(value, list | tuple) else value


def _with_digests(params: dict[str, Any]) -> dict[str, Any]:
    """Return parameters in which a path of a file is the file's name and SHA-256."""
    extra: dict[str, Any] = {}
    for name, value in (params.get("extra") or {}).items():
        path = _file_of(value)
        found = None if path is None else {FILE: path.name, "sha256": file_digest(path)}
        extra[name] = found or _named_files(value)
    return {**params, "extra": extra} if extra else params


def _file_of(value: Any) -> Path | None:
    """Return the file that a parameter names, if it names one."""
    try:
        return Path(value) if isinstance(value, str | Path) and Path(value).is_file() else None
    except (OSError, ValueError):  # too long for a name: a text
        return None
