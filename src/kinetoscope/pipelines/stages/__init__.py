"""Stages shared by pipelines."""

from kinetoscope.pipelines.stages.base import Stage
from kinetoscope.pipelines.stages.decoding import DecodingStage
from kinetoscope.pipelines.stages.denoising import DenoisingStage
from kinetoscope.pipelines.stages.latents import LatentPreparationStage, TimestepPreparationStage
from kinetoscope.pipelines.stages.text import TextEncodingStage
from kinetoscope.pipelines.stages.validation import InputValidationStage, VideoGeometry

__all__ = [
    "DecodingStage",
    "DenoisingStage",
    "InputValidationStage",
    "LatentPreparationStage",
    "Stage",
    "TextEncodingStage",
    "TimestepPreparationStage",
    "VideoGeometry",
]
