"""HunyuanVideo: text-to-video."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from kinetoscope.core.types import SamplingParams
from kinetoscope.diffusion.even_schedule import EvenSchedule
from kinetoscope.diffusion.scheduler import SchedulerAdapter
from kinetoscope.loading import register_transformer
from kinetoscope.loading.autoencoders import register_autoencoder
from kinetoscope.loading.transformers_models import register_tokenizer, register_transformers_model
from kinetoscope.models.hunyuan import spec
from kinetoscope.models.hunyuan.strategy import HunyuanStrategy
from kinetoscope.models.hunyuan.transformer import HunyuanVideoTransformer3DModel
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.pipelines.lazy import Lazy
from kinetoscope.pipelines.stages import (
    DenoisingStage,
    LatentPreparationStage,
    TimestepPreparationStage,
    VideoGeometry,
)
from kinetoscope.pipelines.stages.hunyuan import HunyuanTextEncodingStage, HunyuanValidationStage
from kinetoscope.pipelines.stages.scaled_vae import ScaledDecodingStage


class HunyuanVideo(ComposedPipeline):
    """Prompt -> video with a HunyuanVideo directory."""

    required: ClassVar[tuple[str, ...]] = (
        "tokenizer",
        "text_encoder",
        "tokenizer_2",
        "text_encoder_2",
        "transformer",
        "vae",
        "scheduler",
    )
    attention_roles: ClassVar[tuple[str, ...]] = ("joint", "refiner")
    extra_defaults: ClassVar[Mapping[str, Any]] = spec.EXTRA_DEFAULTS
    preset: ClassVar[str] = "hunyuanvideo-community/HunyuanVideo"
    """The published model whose settings a directory of another name gets."""

    def create_stages(self) -> None:
        """Validation, text, timesteps, latents, denoising, decoding."""
        config = self.config = spec.HunyuanVideoConfig.from_dict(self.model.config("transformer"))
        vae = self.model.config("vae")
        self.geometry = VideoGeometry(
            spatial=vae.get("spatial_compression_ratio", 8),
            temporal=vae.get("temporal_compression_ratio", 4),
            patch=config.patch,
        )
        scheduler = Lazy[SchedulerAdapter](lambda: EvenSchedule.of(self.get_module("scheduler")))
        self.add_stage("validation", HunyuanValidationStage(self.geometry))
        self.add_stage(
            "text_encoding",
            HunyuanTextEncodingStage(
                self.lazy("tokenizer"),
                self.lazy("text_encoder"),
                self.lazy("tokenizer_2"),
                self.lazy("text_encoder_2"),
            ),
        )
        self.add_stage("timesteps", TimestepPreparationStage(scheduler))
        self.add_stage("latents", LatentPreparationStage(self.geometry, config.latent_channels))
        self.add_stage("denoising", DenoisingStage(self.lazy("transformer"), scheduler, HunyuanStrategy, self.hooks))
        self.add_stage("decoding", ScaledDecodingStage(self.lazy("vae")))

    def defaults(self) -> SamplingParams:
        """The directory's own defaults over the preset of its published name."""
        preset = spec.PRESETS.get(self.model.name, spec.PRESETS[self.preset])
        shipped = replace(preset, flow_shift=None, scheduler=None)  # the directory's scheduler_config.json knows these
        own = SamplingParams(**self.model.defaults).over(shipped)
        return own.over(SamplingParams(extra=dict(self.extra_defaults)))

    def forward_flops(self, tokens: int) -> float:
        """See `spec.forward_flops`; the text counts at its longest."""
        return spec.forward_flops(self.config, tokens)


register_autoencoder("AutoencoderKLHunyuanVideo")
for _name in ("LlamaModel", "CLIPTextModel"):
    register_transformers_model(_name)
for _name in ("LlamaTokenizer", "LlamaTokenizerFast", "CLIPTokenizer", "CLIPTokenizerFast"):
    register_tokenizer(_name)
register_transformer(
    "HunyuanVideoTransformer3DModel", HunyuanVideoTransformer3DModel, spec.HunyuanVideoConfig.from_dict
)
