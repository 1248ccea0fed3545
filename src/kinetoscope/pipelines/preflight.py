"""What is asked of a pipeline before anything heavy is loaded: sizes that it can make, files that can be read."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch

from kinetoscope.core.types import SamplingParams
from kinetoscope.loading.components import check_files
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.pipelines.stages.latents import TimestepPreparationStage
from kinetoscope.pipelines.unread import PlannedRun, check_read

logger = logging.getLogger("kinetoscope")
SIZES = ("height", "width", "num_frames")
_CHECKED: WeakKeyDictionary[ComposedPipeline, set[str]] = WeakKeyDictionary()
"""Pipeline -> components whose files were found good."""


@runtime_checkable
class ChecksParams(Protocol):
    """A stage that can say before anything is loaded that it cannot follow the parameters of a request."""

    def check_params(self, params: SamplingParams) -> None:
        """Raise InputError or ConfigError where it cannot."""
        ...


def fitting_defaults(pipeline: ComposedPipeline) -> SamplingParams:
    """Return a pipeline's defaults, with a published model's size and length lowered to what its network can make.

    What the directory itself says stays as it is.
    """
    defaults, own = pipeline.defaults(), pipeline.model.defaults
    return replace(pipeline.geometry.lowered(defaults), **{n: getattr(defaults, n) for n in SIZES if n in own})


def log_lowered_defaults(pipeline: ComposedPipeline) -> None:
    """Log which defaults `fitting_defaults` lowers, if any."""
    published, own = pipeline.defaults(), fitting_defaults(pipeline)
    if lowered := [f"{n}={getattr(own, n)}" for n in SIZES if getattr(own, n) != getattr(published, n)]:
        logger.warning(
            "%s: the defaults of published models are more than this network can make; its own are %s",
            pipeline.model.name, ", ".join(lowered),
        )  # fmt: skip


def without_unread_shift(
    pipeline: ComposedPipeline, params: SamplingParams, defaults: SamplingParams, given: Mapping[str, Any]
) -> SamplingParams:
    """Return the parameters of a request without a default `flow_shift` that the directory's schedule does not read.

    Nobody asked for it: the defaults of a published model are those of its published schedule.

    Args:
        pipeline, params, defaults, given: as for `check_settings`.
    """
    if params.flow_shift is None or given.get("flow_shift") not in (None, defaults.flow_shift):
        return params
    stages = [stage for stage in pipeline.stages.values() if isinstance(stage, TimestepPreparationStage)]
    if all(stage.reads_shift(params.scheduler) for stage in stages):
        return params
    return replace(params, flow_shift=None)


def chooses_solver(pipeline: ComposedPipeline, params: SamplingParams) -> bool:
    """Return whether the solver of `params` is another one than the model's defaults name."""
    return params.scheduler not in (None, pipeline.defaults().scheduler)


def check_opened(pipeline: ComposedPipeline, defaults: SamplingParams) -> None:
    """Refuse a solver that no run of an opened pipeline could take, and log settings of it that change nothing.

    Args:
        pipeline: opened.
        defaults: what requests get for the fields that they leave out.

    Raises:
        InputError: the model has no solver to choose.
    """
    if chooses_solver(pipeline, defaults):
        _check_stages(pipeline, without_unread_shift(pipeline, defaults, defaults, {}))
    args = pipeline.args
    if args.cfg in ("sequential", "batched") and not pipeline.guided:
        logger.warning("cfg=%r: %s has one branch a step; it changes nothing", args.cfg, pipeline.model.name)
    if args.autocast and args.dtype == torch.float32:
        logger.warning("autocast=True: the weights and dtype are both float32; it changes nothing (give dtype=)")


def check_settings(
    pipeline: ComposedPipeline,
    params: SamplingParams,
    defaults: SamplingParams,
    given: Mapping[str, Any],
    inputs: Collection[str],
) -> None:
    """Refuse settings that the run of a request would not read, or that its schedule cannot follow.

    Args:
        pipeline: the pipeline that would make the video.
        params: the request's parameters over the defaults.
        defaults: the model's.
        given: what the request itself gives, with the parameters of the family; None where it leaves a setting out.
        inputs: what it brings beside its prompt.

    Raises:
        InputError: names the setting, its value and the reason.
    """
    usual = {**pipeline.extra_defaults, **asdict(defaults), **(defaults.extra or {})}
    check_read(pipeline.unread, PlannedRun(pipeline, params, frozenset(inputs)), given, usual)
    _check_stages(pipeline, params)


def _check_stages(pipeline: ComposedPipeline, params: SamplingParams) -> None:
    for stage in pipeline.stages.values():
        if isinstance(stage, ChecksParams):
            stage.check_params(params)


def check_component_files(pipeline: ComposedPipeline) -> None:
    """Refuse components whose weights cannot be loaded, by their headers; each that is not loaded yet, once.

    Raises:
        ModelLoadError: see `loading.components.check_files`.
    """
    checked, loaded = _CHECKED.setdefault(pipeline, set()), pipeline.loaded_modules()
    for name in (*pipeline.required, "transformer_2"):
        if name in pipeline.model.components() and name not in checked and name not in loaded:
            check_files(pipeline.model, name)
            checked.add(name)
