"""HunyuanVideo and HunyuanVideo 1.5, text to video."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from kinetoscope.core.errors import ConfigError
from kinetoscope.diffusion.convention import Convention
from kinetoscope.diffusion.denoiser import Denoiser
from kinetoscope.models.hunyuan import spec
from kinetoscope.models.hunyuan15 import spec as spec15
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.pipelines.stages.encoded import pad_rows
from kinetoscope.pipelines.stages.hunyuan import HunyuanTextEncodingStage
from kinetoscope.pipelines.stages.hunyuan15 import Hunyuan15TextEncodingStage
from kinetoscope.pipelines.stages.scaled_vae import encode_scaled
from kinetoscope.train.roles import ModelBase, Text, TrainBatch


class HunyuanBase(ModelBase):
    """What both have in common: text that is masked for real, one noise level a video, a VAE with one factor.

    Raises:
        ConfigError: `uncond="zero"`, which would leave the unconditional branch no token to attend to.
    """

    grid_role: ClassVar[str] = "joint"

    def __init__(self, transformer: nn.Module, **options: Any) -> None:
        super().__init__(transformer, **options)
        if self.uncond == "zero":
            raise ConfigError("HunyuanVideo reads no padding, so zeros are no text; set uncond to negative or empty")

    def predict(self, x: Tensor, s: Tensor, batch: TrainBatch, *, conditional: bool = True, **more: Any) -> Tensor:
        """As `ModelBase.predict`.

        Raises:
            ConfigError: a level for each frame.
        """
        if s.ndim != 1:
            raise ConfigError("HunyuanVideo is told one noise level a video; this method draws one for each frame")
        return super().predict(x, s, batch, conditional=conditional, **more)

    @classmethod
    def encode_video(cls, pipeline: ComposedPipeline, video: Tensor) -> Tensor:
        return encode_scaled(pipeline.get_module("vae"), video)


class HunyuanModel(HunyuanBase):
    """HunyuanVideo: the prompt as states of a language model and one vector of CLIP, the guidance scale embedded.

    Args:
        guidance_scale: what the network is told where it embeds it.

    Raises:
        ConfigError: an image-to-video network; and see `HunyuanBase`.
    """

    convention: ClassVar[Convention] = spec.CONVENTION

    def __init__(self, transformer: nn.Module, *, guidance_scale: float = 1.0, **options: Any) -> None:
        super().__init__(transformer, **options)
        config: Any = transformer.config
        if config.image_condition_type is not None:
            raise ConfigError("this HunyuanVideo network begins from an image, and training gives none")
        self.guidance_scale: float | None = guidance_scale if config.guidance_embeds else None

    @classmethod
    def of(cls, pipeline: ComposedPipeline, **options: Any) -> Self:
        """Told the guidance scale that the directory is sampled with."""
        scale = pipeline.defaults().guidance_scale
        return cls(pipeline.get_module("transformer"), guidance_scale=1.0 if scale is None else scale, **options)

    @classmethod
    @torch.no_grad()
    def encode_text(cls, pipeline: ComposedPipeline, prompts: Sequence[str]) -> Text:
        stage = pipeline.stages["text_encoding"]
        assert isinstance(stage, HunyuanTextEncodingStage)
        words, pooled = stage.encode(prompts, pipeline.args.device)
        return Text(*pad_rows(words, spec.TEXT_LENGTH), {"pooled_projections": pooled})

    def conditioning(self, batch: TrainBatch, conditional: bool, frames: slice | None = None) -> dict[str, Any]:
        """Both texts, and the guidance scale."""
        told = super().conditioning(batch, conditional, frames)
        if self.guidance_scale is not None:
            told["guidance"] = torch.full((batch.rows,), 1000.0 * self.guidance_scale, device=batch.latents.device)
        return told


class Hunyuan15Model(HunyuanBase):
    """HunyuanVideo 1.5: the prompt as states of a language model, what it quotes letter by letter, and channels for
    given frames, of which there are none.

    Raises:
        ConfigError: a network that is told where a step leads; and see `HunyuanBase`.
    """

    convention: ClassVar[Convention] = spec15.CONVENTION

    def __init__(self, transformer: nn.Module, **options: Any) -> None:
        super().__init__(transformer, **options)
        config: Any = transformer.config
        if config.use_meanflow:
            raise ConfigError("this HunyuanVideo 1.5 network was distilled to know the next timestep; train the other")
        self.denoiser = Denoiser(self._without_given_frames, self.convention)

    @classmethod
    @torch.no_grad()
    def encode_text(cls, pipeline: ComposedPipeline, prompts: Sequence[str]) -> Text:
        stage = pipeline.stages["text_encoding"]
        assert isinstance(stage, Hunyuan15TextEncodingStage)
        (words, lengths), (glyphs, counts) = stage.encode(list(prompts), pipeline.args.device)
        return Text(words, lengths, {"encoder_hidden_states_2": glyphs, "text_lengths_2": counts})

    def _without_given_frames(self, latents: Tensor, timestep: Tensor, **conditioning: Any) -> Tensor:
        """The network on [B, C, T, h, w] with an empty condition and mask: [B, 2 C + 1, T, h, w]"""
        rows, channels, *grid = latents.shape
        empty = latents.new_zeros(rows, channels + 1, *grid)
        return self.transformer(torch.cat([latents, empty], 1), timestep, **conditioning)
