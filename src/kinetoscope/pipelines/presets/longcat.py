"""LongCat-Video: text-to-video, image-to-video, video continuation and refinement with one directory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from kinetoscope.attention import Role
from kinetoscope.core.types import SamplingParams
from kinetoscope.engine.strategies.longcat import LongCatStrategy
from kinetoscope.loading import register_transformer
from kinetoscope.loading.directory import Layout, register_layout
from kinetoscope.models.longcat import spec
from kinetoscope.models.longcat.transformer import LongCatVideoTransformer3DModel
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.pipelines.stages import DenoisingStage, InputValidationStage, TextEncodingStage, VideoGeometry
from kinetoscope.pipelines.stages.longcat import (
    EXTRA_DEFAULTS,
    LongCatDecodingStage,
    LongCatLatentStage,
    LongCatRequestStage,
    LongCatTimestepStage,
)
from kinetoscope.pipelines.unread import ONE_ROW, Unread

MODEL = "LongCatVideoTransformer3DModel"
LAYOUT = Layout(  # the published repository has no model_index.json, and its transformer is in `dit`
    folder="dit",
    class_name=MODEL,
    index={
        "_class_name": "LongCatVideoPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "AutoTokenizer"],
        "transformer": ["diffusers", MODEL],
        "vae": ["diffusers", "AutoencoderKLWan"],
    },
    folders={"transformer": "dit"},
)


class LongCatVideo(ComposedPipeline):
    """Prompt, and perhaps a picture or a video to continue or to refine -> video, with a LongCat-Video directory."""

    required: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    tasks: ClassVar[tuple[str, ...]] = ("t2v", "i2v", "vc", "refine")
    text_tokens: ClassVar[int] = spec.TEXT_LENGTH
    attention_roles: ClassVar[tuple[str, ...]] = (Role("self", grid=True), Role("cross", key_bias=True))
    text_modes: ClassVar[tuple[str, ...]] = ("padded", "true_length")
    extra_defaults: ClassVar[Mapping[str, Any]] = EXTRA_DEFAULTS
    unread: ClassVar[tuple[Unread, ...]] = (
        *ComposedPipeline.unread,
        Unread(
            ("t_thresh", "spatial_refine_only"),
            "is of a video to refine, and none is given; give stage1_video=",
            lambda run: run.extra("stage1_video") is None,
        ),
        Unread(
            ("guidance_scale", *ONE_ROW.names),
            "a video is refined without guidance; leave it out",
            lambda run: run.extra("stage1_video") is not None,
        ),
        Unread(
            ("offload_kv_cache",),
            "no keys and values are kept; give use_kv_cache=True with an image or a video",
            lambda run: not run.extra("use_kv_cache") and "video" not in run.inputs,
        ),
    )

    @property
    def inputs(self) -> Mapping[str, bool]:
        """A first picture, or a video to continue; a video to refine is a parameter of its own (`stage1_video`)."""
        return {"image": False, "video": False}

    def create_stages(self) -> None:
        """Validation, the request's own parameters, text, timesteps, latents, denoising, decoding."""
        config = self.config = spec.LongCatConfig.from_dict(self.model.config("transformer"))
        vae = self.model.config("vae")
        self.geometry = VideoGeometry.of(vae, config.patch_size)
        scheduler = self.lazy("scheduler")
        self.add_stage("validation", InputValidationStage(self.geometry))
        self.add_stage("request", LongCatRequestStage())
        self.add_stage(
            "text_encoding",
            TextEncodingStage(self.lazy("tokenizer"), self.lazy("text_encoder"), spec.TEXT_LENGTH),
        )
        self.add_stage("timesteps", LongCatTimestepStage(scheduler))
        self.add_stage("latents", LongCatLatentStage(self.geometry, config.in_channels, self.lazy("vae")))
        self.add_stage("denoising", DenoisingStage(self.lazy("transformer"), scheduler, LongCatStrategy, self.hooks))
        self.add_stage("decoding", LongCatDecodingStage(self.lazy("vae")))

    def defaults(self) -> SamplingParams:
        """The directory's own defaults over those of the published model."""
        preset = spec.PRESETS["meituan-longcat/LongCat-Video"]
        own = SamplingParams(**self.model.defaults).over(preset)
        return own.over(SamplingParams(extra=dict(self.extra_defaults)))

    def forward_flops(self, tokens: int) -> float:
        """See `spec.forward_flops`; the text counts at its padded length."""
        return spec.forward_flops(self.config, tokens)

    def widths(self) -> tuple[int, int]:
        """Of the residual stream and of the feed-forward hidden layer."""
        return self.config.hidden_size, self.config.ffn_dim


register_layout(LAYOUT)
register_transformer(MODEL, LongCatVideoTransformer3DModel, spec.LongCatConfig.from_dict, plan=spec.SHARDING)
