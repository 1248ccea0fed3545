"""Cosmos Predict 1, 2 and 2.5, from text alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kinetoscope.core.errors import ConfigError
from kinetoscope.diffusion.convention import Convention
from kinetoscope.models.cosmos import spec
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.pipelines.presets.cosmos import Cosmos, Cosmos2TextToImage, Cosmos25Predict, CosmosTextToWorld
from kinetoscope.pipelines.stages.cosmos import AllLayersTextStage, encode_frames
from kinetoscope.train.roles import ModelBase, Text, TrainBatch


class CosmosModel(ModelBase):
    """What the generations have in common; `of` makes the one that a directory holds."""

    @classmethod
    def of(cls, pipeline: ComposedPipeline, **options: Any) -> ModelBase:
        """The generation's model.

        Raises:
            ConfigError: it continues given frames, and makes nothing from text alone.
        """
        transformer = pipeline.get_module("transformer")
        if isinstance(pipeline, CosmosTextToWorld):
            return Predict1Model(transformer, fps=pipeline.defaults().fps, **options)
        if isinstance(pipeline, Cosmos2TextToImage):
            return Predict2Model(transformer, **options)
        if isinstance(pipeline, Cosmos25Predict):
            return Predict25Model(transformer, **options)
        raise ConfigError(f"{pipeline.model.name}: this Cosmos model continues given frames, and training gives none")

    @classmethod
    def encode_text(cls, pipeline: ComposedPipeline, prompts: Sequence[str]) -> Text:
        stage = pipeline.stages["text_encoding"]
        if not isinstance(stage, AllLayersTextStage):
            return super().encode_text(pipeline, prompts)
        states = stage.encode(list(prompts), pipeline.args.device)
        return Text(states, torch.full((len(states),), states.shape[1]))  # padding is read like any token

    @classmethod
    def encode_video(cls, pipeline: ComposedPipeline, video: Tensor) -> Tensor:
        assert isinstance(pipeline, Cosmos)
        return encode_frames(pipeline.get_module("vae"), video, pipeline.sigma_data)


class Predict1Model(CosmosModel):
    """Predict 1: EDM, noise levels in [0, inf); rotary positions count time by the frame rate.

    Args:
        fps: frames a second.
    """

    convention: ClassVar[Convention] = spec.CONVENTION_1

    def __init__(self, transformer: nn.Module, *, fps: float | None = None, **options: Any) -> None:
        super().__init__(transformer, **options)
        self.fps = fps

    def conditioning(self, batch: TrainBatch, conditional: bool, frames: slice | None = None) -> dict[str, Any]:
        """The prompt and the frame rate."""
        return {**super().conditioning(batch, conditional, frames), "fps": self.fps}


class Predict2Model(CosmosModel):
    """Predict 2, as the rectified flow that its network is inside the EDM scalings of its sampler."""

    convention: ClassVar[Convention] = spec.FLOW_OF_2


class Predict25Model(CosmosModel):
    """Predict 2.5: a flow, told that no frame is given; every token of its text is read."""

    convention: ClassVar[Convention] = spec.CONVENTION_25

    def conditioning(self, batch: TrainBatch, conditional: bool, frames: slice | None = None) -> dict[str, Any]:
        """The prompt, and an empty mask of given frames."""
        told = super().conditioning(batch, conditional, frames)
        del told["text_lengths"]
        return {**told, "condition_mask": batch.latents.new_zeros(1, 1, batch.latents.shape[2], 1, 1)}
