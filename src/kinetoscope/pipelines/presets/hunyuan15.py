"""HunyuanVideo 1.5: text-to-video and image-to-video."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import kinetoscope.loading.t5  # noqa: F401 - registers the glyph encoder
from kinetoscope.attention import Role
from kinetoscope.core.errors import ModelLoadError
from kinetoscope.core.types import SamplingParams
from kinetoscope.diffusion.even_schedule import EvenSchedule
from kinetoscope.diffusion.scheduler import SchedulerAdapter
from kinetoscope.loading import register_transformer
from kinetoscope.loading.autoencoders import register_autoencoder
from kinetoscope.loading.directory import ModelDir, read_json
from kinetoscope.loading.transformers_models import (
    register_image_processor,
    register_tokenizer,
    register_transformers_model,
)
from kinetoscope.models.hunyuan15 import spec
from kinetoscope.models.hunyuan15.strategy import Hunyuan15Strategy
from kinetoscope.models.hunyuan15.transformer import HunyuanVideo15Transformer3DModel
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.pipelines.lazy import Lazy
from kinetoscope.pipelines.stages import (
    DenoisingStage,
    InputValidationStage,
    LatentPreparationStage,
    TimestepPreparationStage,
    VideoGeometry,
)
from kinetoscope.pipelines.stages.hunyuan15 import Hunyuan15ImageStage, Hunyuan15TextEncodingStage
from kinetoscope.pipelines.stages.scaled_vae import ScaledDecodingStage

TEXT_PARTS = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")


class HunyuanVideo15(ComposedPipeline):
    """Prompt -> video with a HunyuanVideo 1.5 directory."""

    required: ClassVar[tuple[str, ...]] = (*TEXT_PARTS, "transformer", "vae", "scheduler")
    tasks: ClassVar[tuple[str, ...]] = ("t2v",)
    text_tokens: ClassVar[int] = spec.TEXT_LENGTH
    attention_roles: ClassVar[tuple[str, ...]] = (
        Role("joint", key_bias=True, grid=True),
        Role("refiner", key_bias=True),
    )

    def create_stages(self) -> None:
        """Validation, text, timesteps, latents, denoising, decoding."""
        config = self.config = spec.HunyuanVideo15Config.from_dict(self.model.config("transformer"))
        vae = self.model.config("vae")
        self.geometry = VideoGeometry.of(vae, config.patch, spatial=16)
        scheduler = Lazy[SchedulerAdapter](lambda: EvenSchedule.of(self.get_module("scheduler")))
        self.add_stage("validation", InputValidationStage(self.geometry))
        self.add_stage("text_encoding", Hunyuan15TextEncodingStage(*(self.lazy(name) for name in TEXT_PARTS)))
        self.add_stage("timesteps", TimestepPreparationStage(scheduler))
        self.add_stage("latents", LatentPreparationStage(self.geometry, config.latent_channels))
        self.add_stage("denoising", DenoisingStage(self.lazy("transformer"), scheduler, Hunyuan15Strategy, self.hooks))
        self.add_stage("decoding", ScaledDecodingStage(self.lazy("vae")))

    def defaults(self) -> SamplingParams:
        """The directory's own defaults over what its guider says over the preset of its published name or size."""
        config = self.config
        size = "480p" if config.target_size < 960 else "720p"
        like = f"hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-{size}_{self.tasks[0]}"
        preset = spec.PRESETS.get(self.model.name, spec.PRESETS[like])
        shipped = replace(preset, flow_shift=None, scheduler=None)  # the directory's scheduler_config.json knows these
        return SamplingParams(**self.model.defaults).over(guider_params(self.model).over(shipped))

    def forward_flops(self, tokens: int) -> float:
        """See `spec.forward_flops`; the text counts at its longest."""
        return spec.forward_flops(self.config, tokens)

    def widths(self) -> tuple[int, int]:
        """Of the residual stream and of the feed-forward hidden layer."""
        return self.config.dim, int(self.config.dim * self.config.mlp_ratio)


class HunyuanVideo15ImageToVideo(HunyuanVideo15):
    """Prompt and first picture -> video."""

    required: ClassVar[tuple[str, ...]] = (*HunyuanVideo15.required, "image_encoder", "feature_extractor")
    tasks: ClassVar[tuple[str, ...]] = ("i2v",)

    @property
    def inputs(self) -> Mapping[str, bool]:
        """An image, which it needs."""
        return {"image": True}

    def create_stages(self) -> None:
        """As text-to-video, with the features of the image and its latents."""
        super().create_stages()
        parts = [self.lazy(name) for name in ("feature_extractor", "image_encoder", "vae")]
        self.add_stage("image", Hunyuan15ImageStage(*parts), after="latents")


def guider_params(model: ModelDir) -> SamplingParams:
    """Guidance as the directory's guider has it; nothing where there is none.

    Raises:
        ModelLoadError: a guider of another kind, or one that guides only some of the steps.
    """
    kind = model.components().get("guider")
    if kind is None:
        return SamplingParams()
    file = model.folder("guider") / "guider_config.json"
    config: dict[str, Any] = read_json(file)
    if kind != "ClassifierFreeGuidance" or config.get("start", 0.0) != 0.0 or config.get("stop", 1.0) != 1.0:
        raise ModelLoadError(f"{file}: only ClassifierFreeGuidance over all steps is supported; this is {kind}")
    if not config.get("enabled", True):
        return SamplingParams(guidance_scale=1.0)
    scale = float(config.get("guidance_scale", 7.5)) + bool(config.get("use_original_formulation", False))
    return SamplingParams(guidance_scale=scale, guidance_rescale=float(config.get("guidance_rescale", 0.0)))


register_autoencoder("AutoencoderKLHunyuanVideo15")
for _name in ("Qwen2_5_VLTextModel", "SiglipVisionModel"):
    register_transformers_model(_name)
for _name in ("Qwen2Tokenizer", "Qwen2TokenizerFast", "ByT5Tokenizer"):
    register_tokenizer(_name)
for _name in ("SiglipImageProcessor", "SiglipImageProcessorPil"):
    register_image_processor(_name)
register_transformer(
    "HunyuanVideo15Transformer3DModel",
    HunyuanVideo15Transformer3DModel,
    spec.HunyuanVideo15Config.from_dict,
    plan=spec.SHARDING,
)
