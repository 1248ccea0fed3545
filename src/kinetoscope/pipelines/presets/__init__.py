"""Which pipeline a model directory asks for: `_class_name` of its model_index.json -> the pipeline of a family."""

from __future__ import annotations

from typing import Any

from kinetoscope.core.errors import ModelLoadError
from kinetoscope.core.types import ExecutionArgs
from kinetoscope.loading import ModelDir
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.pipelines.presets.wan import WanTextToVideo

PIPELINES: dict[str, type[ComposedPipeline]] = {"WanPipeline": WanTextToVideo}


def pipeline_class(model: ModelDir) -> type[ComposedPipeline]:
    """The pipeline for a directory.

    Raises:
        ModelLoadError: its `_class_name` is not one we run.
    """
    name = model.model_index.get("_class_name")
    if name not in PIPELINES:
        raise ModelLoadError(
            f"{model.path}/model_index.json: _class_name {name!r} is not supported; supported: {', '.join(PIPELINES)}"
        )
    return PIPELINES[name]


def build_pipeline(model: ModelDir, args: ExecutionArgs, **options: Any) -> ComposedPipeline:
    """The pipeline of a directory; `options` are `ComposedPipeline`'s."""
    return pipeline_class(model)(model, args, **options)
