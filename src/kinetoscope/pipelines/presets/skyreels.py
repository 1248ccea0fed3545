"""SkyReels-V2: text-to-video, image-to-video, and diffusion forcing for both and for long videos."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import kinetoscope.loading.clip_processor  # noqa: F401 - registers the processor
from kinetoscope.attention import Role
from kinetoscope.core.types import SamplingParams
from kinetoscope.loading import register_transformer
from kinetoscope.loading.transformers_models import register_image_processor, register_transformers_model
from kinetoscope.models.skyreels import spec
from kinetoscope.models.skyreels.strategy import ForcingStrategy
from kinetoscope.models.skyreels.transformer import SkyReelsV2Transformer3DModel
from kinetoscope.models.wan import original
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.pipelines.stages import (
    DecodingStage,
    DenoisingStage,
    InputValidationStage,
    LatentPreparationStage,
    TextEncodingStage,
    TimestepPreparationStage,
    VideoGeometry,
)
from kinetoscope.pipelines.stages.images import ImageConditionStage, ImageFeatureStage
from kinetoscope.pipelines.stages.skyreels import ForcingLatentStage, ForcingValidationStage


class SkyReelsTextToVideo(ComposedPipeline):
    """Prompt -> video."""

    required: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    tasks: ClassVar[tuple[str, ...]] = ("t2v",)
    text_tokens: ClassVar[int] = spec.TEXT_LENGTH
    attention_roles: ClassVar[tuple[str, ...]] = (Role("self", grid=True), Role("cross", key_bias=True))
    text_modes: ClassVar[tuple[str, ...]] = ("padded", "true_length")
    fallback: ClassVar[str] = "Skywork/SkyReels-V2-T2V-14B-540P-Diffusers"
    """The published model whose settings a directory of another name gets."""

    def create_stages(self) -> None:
        """Validation, text, timesteps, latents and conditions, denoising, decoding."""
        config = self.config = spec.SkyReelsConfig.from_dict(self.model.config("transformer"))
        vae = self.vae_config = self.model.config("vae")
        self.geometry = VideoGeometry.of(vae, config.patch_size, max_positions=config.rope_max_seq_len)
        self.add_stage("validation", InputValidationStage(self.geometry))
        self.add_stage(
            "text_encoding",
            TextEncodingStage(self.lazy("tokenizer"), self.lazy("text_encoder"), spec.TEXT_LENGTH),
        )
        self.add_stage("timesteps", TimestepPreparationStage(self.lazy("scheduler")))
        self.add_sample_stages()
        self.add_stage("decoding", DecodingStage(self.lazy("vae")))

    def add_sample_stages(self) -> None:
        """Latents and denoising."""
        self.add_stage("latents", LatentPreparationStage(self.geometry, self.vae_config.get("z_dim", 16)))
        self.add_stage("denoising", DenoisingStage(self.lazy("transformer"), self.lazy("scheduler"), hooks=self.hooks))

    def defaults(self) -> SamplingParams:
        """The directory's own defaults over the preset of its published name."""
        preset = spec.PRESETS.get(self.model.name, spec.PRESETS[self.fallback])
        return SamplingParams(**self.model.defaults).over(preset)

    def forward_flops(self, tokens: int) -> float:
        """See `spec.forward_flops`; the text counts at its padded length."""
        return spec.forward_flops(self.config, tokens)

    def widths(self) -> tuple[int, int]:
        """Of the residual stream and of the feed-forward hidden layer."""
        return self.config.dim, self.config.ffn_dim


class SkyReelsImageToVideo(SkyReelsTextToVideo):
    """Image (and last image) and prompt -> video."""

    required: ClassVar[tuple[str, ...]] = (*SkyReelsTextToVideo.required, "image_encoder", "image_processor")
    tasks: ClassVar[tuple[str, ...]] = ("i2v", "flf2v")
    fallback: ClassVar[str] = "Skywork/SkyReels-V2-I2V-14B-540P-Diffusers"

    @property
    def inputs(self) -> Mapping[str, bool]:
        """The image; the last image too where the model has positions for the features of both."""
        return {"image": True} | ({} if self.config.pos_embed_seq_len is None else {"last_image": True})

    def add_sample_stages(self) -> None:
        """Image features and condition latents before denoising."""
        features = ImageFeatureStage(self.lazy("image_processor"), self.lazy("image_encoder"))
        self.add_stage("image_features", features)
        self.add_stage("image_condition", ImageConditionStage(self.lazy("vae"), self.geometry))
        super().add_sample_stages()


class SkyReelsForcing(SkyReelsTextToVideo):
    """Prompt, and perhaps a first (and last) image or a video to continue -> video of any length, by diffusion forcing.

    What continues a video begins with its last `overlap_history` frames.
    """

    tasks: ClassVar[tuple[str, ...]] = ("t2v", "i2v", "flf2v", "vc")
    any_length: ClassVar[bool] = True
    extra_defaults: ClassVar[Mapping[str, Any]] = spec.FORCING_EXTRA
    fallback: ClassVar[str] = "Skywork/SkyReels-V2-DF-14B-540P-Diffusers"

    @property
    def inputs(self) -> Mapping[str, bool]:
        """A first image, and a last one with it; or a video."""
        return {"image": False, "last_image": False, "video": False}

    def add_sample_stages(self) -> None:
        """Windows of noise, and the strategy that gives each frame its own timestep."""
        transformer, scheduler = self.lazy("transformer"), self.lazy("scheduler")
        self.add_stage("validation", ForcingValidationStage(self.geometry, self.config.num_frame_per_block))
        self.add_stage("latents", ForcingLatentStage(self.geometry, self.config.in_channels, self.lazy("vae")))
        self.add_stage("denoising", DenoisingStage(transformer, scheduler, ForcingStrategy, self.hooks))

    def defaults(self) -> SamplingParams:
        """As of all; `extra` is filled up."""
        return super().defaults().over(SamplingParams(extra=dict(self.extra_defaults)))


class SkyReelsForcingImageToVideo(SkyReelsForcing):
    """The same by the name of its image-to-video pipeline: an image is required, and guidance and shift are its own."""

    tasks: ClassVar[tuple[str, ...]] = ("i2v", "flf2v")

    @property
    def inputs(self) -> Mapping[str, bool]:
        """The first image, and perhaps a last one."""
        return {"image": True, "last_image": False}

    def defaults(self) -> SamplingParams:
        """As of diffusion forcing, with the guidance and shift of image-to-video."""
        return SamplingParams(**self.model.defaults).over(spec.FORCING_IMAGE).over(super().defaults())


class SkyReelsForcingContinuation(SkyReelsForcing):
    """The same by the name of its video-to-video pipeline: a video is required."""

    tasks: ClassVar[tuple[str, ...]] = ("vc",)

    @property
    def inputs(self) -> Mapping[str, bool]:
        """The video."""
        return {"video": True}

    def defaults(self) -> SamplingParams:
        """As of diffusion forcing; 17 frames overlap."""
        return SamplingParams(**self.model.defaults).over(spec.FORCING_VIDEO).over(super().defaults())


register_transformer(
    "SkyReelsV2Transformer3DModel",
    SkyReelsV2Transformer3DModel,
    spec.SkyReelsConfig.from_dict,
    key_map=original.rename,  # published under the names of Wan's authors too
    plan=spec.SHARDING,
)
register_transformers_model("CLIPVisionModelWithProjection")
for _processor in ("CLIPImageProcessor", "CLIPImageProcessorPil"):
    register_image_processor(_processor)
