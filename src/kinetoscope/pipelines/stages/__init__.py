"""Stages shared by pipelines."""

from kinetoscope.pipelines.stages.base import Stage
from kinetoscope.pipelines.stages.decoding import DecodingStage
from kinetoscope.pipelines.stages.denoising import DenoisingStage
from kinetoscope.pipelines.stages.images import (
    FirstFrameStage,
    ImageConditionStage,
    ImageFeatureStage,
    NoisedVideoStage,
)
from kinetoscope.pipelines.stages.latents import LatentPreparationStage, TimestepPreparationStage
from kinetoscope.pipelines.stages.text import TextEncodingStage
from kinetoscope.pipelines.stages.validation import InputValidationStage, VideoGeometry

__all__ = [
    "DecodingStage",
    "DenoisingStage",
    "FirstFrameStage",
    "ImageConditionStage",
    "ImageFeatureStage",
    "InputValidationStage",
    "LatentPreparationStage",
    "NoisedVideoStage",
    "Stage",
    "TextEncodingStage",
    "TimestepPreparationStage",
    "VideoGeometry",
]
