"""Wan 2.1 and 2.2 (one transformer), text to video."""

from __future__ import annotations

from typing import Any, ClassVar

from kinetoscope.core.errors import ConfigError
from kinetoscope.diffusion.convention import Convention
from kinetoscope.models.wan.spec import CONVENTION
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.train.roles import ModelBase


class WanModel(ModelBase):
    """Bidirectional Wan."""

    convention: ClassVar[Convention] = CONVENTION

    @classmethod
    def of(cls, pipeline: ComposedPipeline, **options: Any) -> ModelBase:
        """As `ModelBase.of`.

        Raises:
            ConfigError: the network reads more than it makes (a given image, a control video); see `ModelBase.of`.
        """
        config = pipeline.model.config("transformer")
        read, made = config["in_channels"], config["out_channels"]
        if read != made:
            raise ConfigError(
                f"{pipeline.model.name}: this Wan network reads {read} channels and makes {made}: it is given an image "
                "or a video, and training gives none"
            )
        return super().of(pipeline, **options)
