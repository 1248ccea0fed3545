"""HunyuanVideo: text-to-video and image-to-video."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from kinetoscope.attention import Role
from kinetoscope.core.errors import ModelLoadError
from kinetoscope.core.types import SamplingParams
from kinetoscope.diffusion.even_schedule import EvenSchedule
from kinetoscope.diffusion.scheduler import SchedulerAdapter
from kinetoscope.loading import register_transformer
from kinetoscope.loading.autoencoders import register_autoencoder
from kinetoscope.loading.transformers_models import (
    register_image_processor,
    register_tokenizer,
    register_transformers_model,
)
from kinetoscope.models.hunyuan import original, spec
from kinetoscope.models.hunyuan.strategy import HunyuanFirstFrameStrategy, HunyuanStrategy
from kinetoscope.models.hunyuan.transformer import HunyuanVideoTransformer3DModel
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.pipelines.lazy import Lazy
from kinetoscope.pipelines.stages import (
    DenoisingStage,
    LatentPreparationStage,
    Stage,
    TimestepPreparationStage,
    VideoGeometry,
)
from kinetoscope.pipelines.stages.hunyuan import (
    HunyuanImageLatentStage,
    HunyuanImageTextStage,
    HunyuanTextEncodingStage,
    HunyuanValidationStage,
)
from kinetoscope.pipelines.stages.scaled_vae import ScaledDecodingStage
from kinetoscope.pipelines.unread import NO_NEGATIVE, ONE_ROW, Unread

TEXT_PARTS = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")


class HunyuanVideo(ComposedPipeline):
    """Prompt -> video with a HunyuanVideo directory."""

    required: ClassVar[tuple[str, ...]] = (*TEXT_PARTS, "transformer", "vae", "scheduler")
    tasks: ClassVar[tuple[str, ...]] = ("t2v",)
    text_tokens: ClassVar[int] = spec.TEXT_LENGTH
    attention_roles: ClassVar[tuple[str, ...]] = (
        Role("joint", key_bias=True, grid=True),
        Role("refiner", key_bias=True),
    )
    extra_defaults: ClassVar[Mapping[str, Any]] = spec.EXTRA_DEFAULTS
    unread: ClassVar[tuple[Unread, ...]] = (
        Unread(
            ("guidance_scale",),
            "this network is not told it; use 1, and true_cfg_scale for classifier-free guidance",
            lambda run: not run.pipeline.config.guidance_embeds,
        ),
        Unread(ONE_ROW.names, "needs an unconditional row, which true_cfg_scale above 1 adds", ONE_ROW.when),
        NO_NEGATIVE,
    )
    preset: ClassVar[str] = "hunyuanvideo-community/HunyuanVideo"
    """The published model whose settings a directory of another name gets."""

    def create_stages(self) -> None:
        """Validation, text, timesteps, latents, denoising, decoding."""
        config = self.config = spec.HunyuanVideoConfig.from_dict(self.model.config("transformer"))
        vae = self.model.config("vae")
        self.geometry = VideoGeometry.of(vae, config.patch)
        told = {"embeds_guidance": config.guidance_embeds}
        self.add_stage("validation", HunyuanValidationStage(self.geometry, **told))
        self.add_stage("text_encoding", self._text_stage())
        self.add_stage("timesteps", TimestepPreparationStage(self._even_schedule()))
        self.add_stage("latents", LatentPreparationStage(self.geometry, config.latent_channels))
        self._denoise_and_decode(HunyuanStrategy)

    def _text_stage(self) -> Stage:
        return HunyuanTextEncodingStage(*(self.lazy(name) for name in TEXT_PARTS))

    def _even_schedule(self) -> Lazy[SchedulerAdapter]:
        return Lazy[SchedulerAdapter](lambda: EvenSchedule.of(self.get_module("scheduler")))

    def _denoise_and_decode(self, strategy: type[HunyuanStrategy], skip: int = 0) -> None:
        transformer = self.lazy("transformer")
        self.add_stage("denoising", DenoisingStage(transformer, self._even_schedule(), strategy, self.hooks))
        self.add_stage("decoding", ScaledDecodingStage(self.lazy("vae"), skip))

    def defaults(self) -> SamplingParams:
        """The directory's own defaults over the preset of its published name."""
        preset = spec.PRESETS.get(self.model.name) or spec.PRESETS[self.preset]
        if not self.config.guidance_embeds:
            preset = replace(preset, guidance_scale=1.0)
        shipped = replace(preset, flow_shift=None, scheduler=None)  # the directory's scheduler_config.json knows these
        own = SamplingParams(**self.model.defaults).over(shipped)
        return own.over(SamplingParams(extra=dict(self.extra_defaults)))

    def forward_flops(self, tokens: int) -> float:
        """See `spec.forward_flops`; the text counts at its longest."""
        return spec.forward_flops(self.config, tokens)

    def widths(self) -> tuple[int, int]:
        """Of the residual stream and of the feed-forward hidden layer."""
        return self.config.dim, int(self.config.dim * self.config.mlp_ratio)

    def rows(self, params: SamplingParams) -> int:
        """Guidance is embedded; only `true_cfg_scale` adds a row."""
        return 1 if (params.extra or {}).get("true_cfg_scale", 1.0) == 1.0 else 2


class HunyuanImageToVideo(HunyuanVideo):
    """Prompt and first picture -> video. The transformer's `image_condition_type` says how the picture enters.

    By "latent_concat" the picture's latent frame is denoised with the others and then left out, as published: a request
    for 129 frames makes 125.
    """

    required: ClassVar[tuple[str, ...]] = (*TEXT_PARTS, "image_processor", "transformer", "vae", "scheduler")
    tasks: ClassVar[tuple[str, ...]] = ("i2v",)
    preset: ClassVar[str] = "hunyuanvideo-community/HunyuanVideo-I2V"

    @property
    def inputs(self) -> Mapping[str, bool]:
        """An image, which it needs."""
        return {"image": True}

    def create_stages(self) -> None:
        """As text-to-video, with the image in the text, in the start and as a condition."""
        super().create_stages()
        kind = self.config.image_condition_type
        if kind is None:
            raise ModelLoadError(
                f"{self.model.path}/transformer/config.json has no image_condition_type, so it takes no image"
            )
        self.add_stage("image_latents", HunyuanImageLatentStage(self.lazy("vae"), kind), after="latents")
        told = {"embeds_guidance": self.config.guidance_embeds}
        concat = kind == "latent_concat"  # its first latent frame is the image and no part of the video
        self.add_stage("validation", HunyuanValidationStage(self.geometry, int(concat), keeps_image=not concat, **told))
        self._denoise_and_decode(HunyuanStrategy if concat else HunyuanFirstFrameStrategy, int(concat))

    def _text_stage(self) -> Stage:
        stride = spec.IMAGE_STRIDE.get(self.config.image_condition_type or "", 1)
        parts = [self.lazy(name) for name in TEXT_PARTS]
        return HunyuanImageTextStage(*parts, image_processor=self.lazy("image_processor"), stride=stride)


register_autoencoder("AutoencoderKLHunyuanVideo")
for _name in ("LlamaModel", "LlavaForConditionalGeneration", "CLIPTextModel"):
    register_transformers_model(_name)
for _name in ("LlamaTokenizer", "LlamaTokenizerFast", "CLIPTokenizer", "CLIPTokenizerFast"):
    register_tokenizer(_name)
for _name in ("CLIPImageProcessor", "CLIPImageProcessorPil"):
    register_image_processor(_name)
register_transformer(
    "HunyuanVideoTransformer3DModel",
    HunyuanVideoTransformer3DModel,
    spec.HunyuanVideoConfig.from_dict,
    lora_names=original.lora_names,
    plan=spec.SHARDING,
)
