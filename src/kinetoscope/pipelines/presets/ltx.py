"""LTX-Video: text-to-video, and image-to-video with the same directory."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import kinetoscope.loading.t5  # noqa: F401 - registers the text encoder
from kinetoscope.attention import Role
from kinetoscope.core.types import SamplingParams
from kinetoscope.loading import register_transformer
from kinetoscope.loading.autoencoders import register_autoencoder
from kinetoscope.models.ltx import spec
from kinetoscope.models.ltx.strategy import LTXStrategy
from kinetoscope.models.ltx.transformer import LTXVideoTransformer3DModel
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.pipelines.stages import DenoisingStage, VideoGeometry
from kinetoscope.pipelines.stages.ltx import (
    FirstFrameLatentStage,
    PaddedTextEncodingStage,
    SizedTimestepStage,
    TimedDecodingStage,
    TimedValidationStage,
)
from kinetoscope.pipelines.unread import Unread


class LTXVideo(ComposedPipeline):
    """Prompt, and perhaps a first frame -> video with an LTX-Video directory."""

    required: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    tasks: ClassVar[tuple[str, ...]] = ("t2v", "i2v")
    text_tokens: ClassVar[int] = spec.TEXT_LENGTH
    attention_roles: ClassVar[tuple[str, ...]] = (Role("self", grid=True), Role("cross", key_bias=True))
    extra_defaults: ClassVar[Mapping[str, Any]] = spec.EXTRA_DEFAULTS
    unread: ClassVar[tuple[Unread, ...]] = (
        *ComposedPipeline.unread,
        Unread(
            tuple(spec.EXTRA_DEFAULTS),
            "the VAE of this directory is not told a noise level (timestep_conditioning is off); leave it out",
            lambda run: not run.pipeline.model.config("vae").get("timestep_conditioning"),
        ),
    )

    @property
    def inputs(self) -> Mapping[str, bool]:
        """A first image."""
        return {"image": False}

    def create_stages(self) -> None:
        """Validation, text, timesteps, latents, denoising, decoding."""
        config = self.config = spec.LTXConfig.from_dict(self.model.config("transformer"))
        self.geometry = _geometry(self.model.config("vae"))
        strategy = partial(LTXStrategy, spatial=self.geometry.spatial, temporal=self.geometry.temporal)
        scheduler, vae = self.lazy("scheduler"), self.lazy("vae")
        self.add_stage("validation", TimedValidationStage(self.geometry, keeps_image=True))
        self.add_stage(
            "text_encoding",
            PaddedTextEncodingStage(self.lazy("tokenizer"), self.lazy("text_encoder"), spec.TEXT_LENGTH),
        )
        self.add_stage("timesteps", SizedTimestepStage(scheduler, self.geometry))
        self.add_stage("latents", FirstFrameLatentStage(self.geometry, config.in_channels, vae))
        self.add_stage("denoising", DenoisingStage(self.lazy("transformer"), scheduler, strategy, self.hooks))
        self.add_stage("decoding", TimedDecodingStage(vae))

    def defaults(self) -> SamplingParams:
        """The directory's own defaults over the preset of its published name."""
        preset = spec.PRESETS.get(self.model.name, spec.PRESETS["Lightricks/LTX-Video"])
        own = SamplingParams(**self.model.defaults).over(preset)
        return own.over(SamplingParams(extra=dict(self.extra_defaults)))

    def forward_flops(self, tokens: int) -> float:
        """See `spec.forward_flops`; the text counts at its padded length."""
        return spec.forward_flops(self.config, tokens)

    def widths(self) -> tuple[int, int]:
        """Of the residual stream and of the feed-forward hidden layer."""
        return self.config.dim, 4 * self.config.dim


def _geometry(vae: Mapping[str, Any]) -> VideoGeometry:
    """Pixels and frames a latent position spans, as the published VAE counts them."""
    halvings = 2 ** sum(vae.get("spatio_temporal_scaling", (True, True, True, False)))
    return VideoGeometry(
        spatial=vae.get("spatial_compression_ratio") or vae.get("patch_size", 4) * halvings,
        temporal=vae.get("temporal_compression_ratio") or vae.get("patch_size_t", 1) * halvings,
        patch=(1, 1, 1),
    )


register_autoencoder("AutoencoderKLLTXVideo")
register_transformer(
    "LTXVideoTransformer3DModel", LTXVideoTransformer3DModel, spec.LTXConfig.from_dict, plan=spec.SHARDING
)
