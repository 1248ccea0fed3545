"""Which pipeline a model directory asks for: `_class_name` of its model_index.json -> the pipeline of a family."""

from __future__ import annotations

from typing import Any

from kinetoscope.core.errors import CompositionError, ModelLoadError
from kinetoscope.core.protocols import check_class
from kinetoscope.core.types import ExecutionArgs
from kinetoscope.loading import ModelDir
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.pipelines.presets.causal_wan import CausalWan
from kinetoscope.pipelines.presets.cosmos import (
    Cosmos2TextToImage,
    Cosmos2VideoToWorld,
    Cosmos25Predict,
    CosmosTextToWorld,
    CosmosVideoToWorld,
)
from kinetoscope.pipelines.presets.fast_wan import FastWanImageToVideo, FastWanTextToVideo
from kinetoscope.pipelines.presets.few_step import (
    FewStepCosmos25,
    FewStepHunyuanVideo,
    FewStepHunyuanVideo15,
    FewStepLongCat,
)
from kinetoscope.pipelines.presets.hunyuan import HunyuanImageToVideo, HunyuanVideo
from kinetoscope.pipelines.presets.hunyuan15 import HunyuanVideo15, HunyuanVideo15ImageToVideo
from kinetoscope.pipelines.presets.longcat import LongCatVideo
from kinetoscope.pipelines.presets.ltx import LTXVideo
from kinetoscope.pipelines.presets.matrix_game import MatrixGameVideo, MatrixGameWorld
from kinetoscope.pipelines.presets.skyreels import (
    SkyReelsForcing,
    SkyReelsForcingContinuation,
    SkyReelsForcingImageToVideo,
    SkyReelsImageToVideo,
    SkyReelsTextToVideo,
)
from kinetoscope.pipelines.presets.wan import WanControl, WanImageToVideo, WanTextToVideo, WanVideoToVideo

PIPELINES: dict[str, type[ComposedPipeline]] = {
    "Cosmos2TextToImagePipeline": Cosmos2TextToImage,
    "Cosmos2VideoToWorldPipeline": Cosmos2VideoToWorld,
    "Cosmos2_5_PredictBasePipeline": Cosmos25Predict,
    "Cosmos2_5_PredictDMDPipeline": FewStepCosmos25,
    "CosmosTextToWorldPipeline": CosmosTextToWorld,
    "CosmosVideoToWorldPipeline": CosmosVideoToWorld,
    "HunyuanVideo15DMDPipeline": FewStepHunyuanVideo15,
    "HunyuanVideo15ImageToVideoPipeline": HunyuanVideo15ImageToVideo,
    "HunyuanVideo15Pipeline": HunyuanVideo15,
    "HunyuanVideoDMDPipeline": FewStepHunyuanVideo,
    "HunyuanVideoImageToVideoPipeline": HunyuanImageToVideo,
    "HunyuanVideoPipeline": HunyuanVideo,
    "LTXImageToVideoPipeline": LTXVideo,
    "LTXPipeline": LTXVideo,
    "LongCatVideoDMDPipeline": FewStepLongCat,
    "LongCatVideoPipeline": LongCatVideo,
    "MatrixGame2CausalDMDPipeline": MatrixGameWorld,
    "MatrixGame2I2VPipeline": MatrixGameVideo,
    "MatrixGameCausalDMDPipeline": MatrixGameWorld,
    "MatrixGamePipeline": MatrixGameVideo,
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": SkyReelsForcingImageToVideo,
    "SkyReelsV2DiffusionForcingPipeline": SkyReelsForcing,
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": SkyReelsForcingContinuation,
    "SkyReelsV2ImageToVideoPipeline": SkyReelsImageToVideo,
    "SkyReelsV2Pipeline": SkyReelsTextToVideo,
    "WanCausalDMDPipeline": CausalWan,
    "WanDMDPipeline": FastWanTextToVideo,
    "WanFunControlPipeline": WanControl,
    "WanImageToVideoDmdPipeline": FastWanImageToVideo,
    "WanImageToVideoPipeline": WanImageToVideo,
    "WanPipeline": WanTextToVideo,
    "WanVideoToVideoPipeline": WanVideoToVideo,
}


def register_pipeline(class_name: str, pipeline: type[ComposedPipeline]) -> None:
    """Say which pipeline opens directories whose model_index.json names `class_name`.

    Raises:
        CompositionError: `pipeline` is no class of pipelines, or lacks what the base class leaves to it.
    """
    role = f"register_pipeline({class_name!r})"
    if not isinstance(pipeline, type) or not issubclass(pipeline, ComposedPipeline):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise CompositionError(f"{role}: {pipeline!r} is no subclass of ComposedPipeline")
    check_class(pipeline, ComposedPipeline, role)
    for name in ("create_stages", "defaults", "forward_flops", "widths"):
        if getattr(pipeline, name) is getattr(ComposedPipeline, name):
            raise CompositionError(f"{role}: {pipeline.__name__} does not override {name}")
    PIPELINES[class_name] = pipeline


def pipeline_class(model: ModelDir) -> type[ComposedPipeline]:
    """The pipeline for a directory.

    Raises:
        ModelLoadError: its `_class_name` is not one we run.
    """
    name = model.model_index.get("_class_name")
    if name not in PIPELINES:
        raise ModelLoadError(
            f"{model.path}/model_index.json: _class_name {name!r} is not supported; supported: {', '.join(PIPELINES)}. "
            "A module that adds a family is given with --import MODULE"
        )
    return PIPELINES[name].variant(model)


def build_pipeline(model: ModelDir, args: ExecutionArgs, **options: Any) -> ComposedPipeline:
    """The pipeline of a directory; `options` are `ComposedPipeline`'s."""
    return pipeline_class(model)(model, args, **options)
