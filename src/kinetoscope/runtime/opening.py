"""A model directory opened with settings: what each setting asks for, checked before anything heavy is loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kinetoscope.attention import capabilities, resolve_attention
from kinetoscope.core.config import settings
from kinetoscope.core.errors import CompositionError, ConfigError, shown
from kinetoscope.core.spec import unknown
from kinetoscope.core.types import ExecutionArgs
from kinetoscope.engine.hooks import Hook, PerfLoggingHook
from kinetoscope.engine.hooks.base import arrange
from kinetoscope.engine.rows import CFG_PLANS, PARALLEL
from kinetoscope.loading import ModelDir
from kinetoscope.parallel import Groups
from kinetoscope.pipelines.catalogue import find_model
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.pipelines.presets import build_pipeline, pipeline_class
from kinetoscope.runtime.caches import open_cache
from kinetoscope.runtime.care import Care
from kinetoscope.runtime.device import resolve_device, resolve_dtype
from kinetoscope.runtime.parallel import check_layout, parallel_hooks

MAX_THREADS = 1024
logger = logging.getLogger("kinetoscope.attention")


def chosen_attention(attention: str | Mapping[str, str] | None) -> str | Mapping[str, str]:
    """Return the attention that a caller names, else the one of `KINETOSCOPE_ATTENTION`, else "auto"."""
    if attention is not None:
        return attention
    setting = settings().attention
    if setting != "auto":
        logger.info("attention: %s (from KINETOSCOPE_ATTENTION)", setting)
    return setting


def open_pipeline(
    model: str | Path | ModelDir,
    device: str | torch.device,
    dtype: str | torch.dtype,
    *,
    attention: str | Mapping[str, str],
    cfg: str,
    text_mode: str | None,
    cache: str | None,
    compile: bool | str,
    quantize: str | None,
    offload: str | None,
    vae: str,
    autocast: bool,
    hooks: Sequence[Hook],
    perf_logging: bool | None,
    threads: int | None,
    modules: Mapping[str, Any] | None,
    groups: Groups | None = None,
) -> tuple[ComposedPipeline, dict[str, Any]]:
    """The pipeline, and the settings as a replay record keeps them. See `VideoGenerator.from_pretrained`.

    Args:
        groups: this process's place in a layout of several, each of which opens the same model with the same settings;
            its device is used then.
    """
    place = resolve_device(device if groups is None else groups.device)
    number = resolve_dtype(dtype, place)
    if cfg not in CFG_PLANS:
        raise ConfigError(unknown("cfg plan", cfg, CFG_PLANS))
    if threads is not None:
        if not 1 <= threads <= MAX_THREADS:
            raise ConfigError(f"threads={shown(threads)} is outside [1, {MAX_THREADS}]")
        torch.set_num_threads(threads)
    directory = model if isinstance(model, ModelDir) else find_model(str(model))
    kind = pipeline_class(directory)
    if groups is not None:
        check_layout(groups.config, directory, {
            "attention": attention, "cfg": cfg, "text_mode": text_mode, "cache": cache, "compile": compile,
            "quantize": quantize, "offload": offload, "vae": vae, "autocast": autocast, "modules": modules,
        })  # fmt: skip
    _check_text_mode(text_mode, kind, directory.name)
    table = resolve_attention(attention, capabilities(place.type, number), kind.attention_roles)
    watch = settings().denoising_perf_logging if perf_logging is None else perf_logging
    hooks = [*hooks, *([PerfLoggingHook()] if watch else [])]
    if cache is not None:
        step_cache, cache = open_cache(cache, directory)
        hooks.append(step_cache)
    if groups is not None:
        hooks += parallel_hooks(groups, kind)
    trained = kind.text_modes[:1] == (text_mode,)
    plan = cfg if groups is None or groups.cfg.size == 1 else PARALLEL
    args = ExecutionArgs(
        place, number, autocast=autocast, cfg=plan, attention=table, text_mode=None if trained else text_mode,
        ulysses=1 if groups is None else groups.ulysses.size, ranks=1 if groups is None else groups.config.ranks,
    )  # fmt: skip
    care = Care(args, compile=compile, quantize=quantize, offload=offload, vae=vae, modules=modules, groups=groups)
    pipeline = build_pipeline(directory, args, hooks=arrange(hooks), modules=modules, care=care)
    care.attach(pipeline)
    return pipeline, {
        "attention": attention if isinstance(attention, str) else dict(attention),
        "cfg": cfg,
        "text_mode": text_mode,
        "cache": cache,
        "compile": compile,
        "quantize": quantize,
        "offload": offload,
        "vae": vae,
        "autocast": autocast,
    }


def _check_text_mode(mode: str | None, kind: type[ComposedPipeline], name: str) -> None:
    if mode not in (None, "padded", "true_length"):
        raise ConfigError(unknown("text_mode", mode, ("padded", "true_length")))
    if mode is not None and mode not in kind.text_modes:
        reads = f"reads its text as {' or '.join(kind.text_modes)}" if kind.text_modes else "has no such choice"
        raise CompositionError(f"text_mode={mode!r} and {name} cannot be used together: the model {reads}")
