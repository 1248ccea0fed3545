"""Cosmos Predict 1 (text- and video-to-world), Predict 2 (text-to-image, video-to-world) and Predict 2.5 (all in one).

NVIDIA's licence asks that these models run with its guardrail, a separate package; here no safety checker is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import kinetoscope.loading.cosmos
import kinetoscope.loading.t5  # noqa: F401 - both register components
from kinetoscope.attention import Role
from kinetoscope.core.errors import InputError
from kinetoscope.core.types import SamplingParams
from kinetoscope.diffusion.convention import Convention
from kinetoscope.diffusion.edm import EDMAdapter
from kinetoscope.diffusion.scheduler import SchedulerAdapter
from kinetoscope.engine.strategies.cosmos import CosmosStrategy
from kinetoscope.loading import register_transformer
from kinetoscope.loading.transformers_models import register_tokenizer, register_transformers_model
from kinetoscope.models.cosmos import spec
from kinetoscope.models.cosmos.transformer import CosmosTransformer3DModel
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.pipelines.lazy import Lazy
from kinetoscope.pipelines.stages import (
    DenoisingStage,
    InputValidationStage,
    LatentPreparationStage,
    Stage,
    TimestepPreparationStage,
    VideoGeometry,
)
from kinetoscope.pipelines.stages.cosmos import (
    AllLayersTextStage,
    CosmosDecodingStage,
    PlainTextEncodingStage,
    Predict1FramesStage,
    Predict2FramesStage,
    Predict25FramesStage,
    RateStage,
)
from kinetoscope.pipelines.unread import ONE_ROW, Unread


class Cosmos(ComposedPipeline):
    """What the Cosmos pipelines share: the order of their stages."""

    required: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    text_tokens: ClassVar[int] = spec.TEXT_LENGTH
    attention_roles: ClassVar[tuple[str, ...]] = (Role("self", grid=True), Role("cross", key_bias=True))
    text_modes: ClassVar[tuple[str, ...]] = ("padded", "true_length")
    convention: ClassVar[Convention]
    preset: ClassVar[str]
    """The published model whose defaults a directory of another name gets."""

    def create_stages(self) -> None:
        """Validation, timesteps (which refuse a solver early), text, latents with given frames, denoising, decoding."""
        config = self.config = spec.CosmosConfig.from_dict(self.model.config("transformer"))
        self.geometry = self.make_geometry(self.model.config("vae"), config)
        edm = self.convention.preconditioning
        self.sigma_data = 1.0 if edm is None else edm.sigma_data
        scheduler = self.make_scheduler()
        strategy = partial(CosmosStrategy, convention=self.convention)
        self.add_stage("validation", InputValidationStage(self.geometry, keeps_image=True))
        self.add_stage("timesteps", TimestepPreparationStage(scheduler))
        self.add_stage("text_encoding", self.text_stage())
        for name, stage in self.latent_stages().items():
            self.add_stage(name, stage)
        self.add_stage("denoising", DenoisingStage(self.lazy("transformer"), scheduler, strategy, self.hooks))
        self.add_stage("decoding", CosmosDecodingStage(self.lazy("vae"), self.sigma_data))

    def make_geometry(self, vae: Mapping[str, Any], config: spec.CosmosConfig) -> VideoGeometry:
        """Pixels to latents of the directory's VAE."""
        halvings = vae.get("temperal_downsample", (False, True, True))
        return VideoGeometry(
            spatial=vae.get("spatial_compression_ratio", 2 ** len(halvings)),
            temporal=vae.get("temporal_compression_ratio", 2 ** sum(halvings)),
            patch=config.patch_size,
            max_positions=config.max_tokens,
        )

    def make_scheduler(self) -> SchedulerAdapter | Lazy[SchedulerAdapter]:
        """The prototype of runs."""
        return self.lazy("scheduler")

    def text_stage(self) -> Stage:
        """T5, zero beyond the true length."""
        return PlainTextEncodingStage(self.lazy("tokenizer"), self.lazy("text_encoder"), spec.TEXT_LENGTH)

    def latent_stages(self) -> dict[str, Stage]:
        """Stages that make the latents."""
        return {"latents": LatentPreparationStage(self.geometry, self.config.out_channels)}

    def frames_stage(self, kind: type[Any]) -> dict[str, Stage]:
        """The stage of noise and given frames."""
        options = (self.config.out_channels, self.lazy("vae"), self.sigma_data, self.extra_defaults)
        return {"latents": kind(self.geometry, *options)}

    def defaults(self) -> SamplingParams:
        """The directory's own defaults over the preset of its published name, or else of its kind."""
        preset = spec.PRESETS.get(self.model.name, spec.PRESETS[self.preset])
        own = SamplingParams(**self.model.defaults).over(preset)
        return own.over(SamplingParams(extra=dict(self.extra_defaults))) if self.extra_defaults else own

    def forward_flops(self, tokens: int) -> float:
        """See `spec.forward_flops`; the text counts at its padded length."""
        return spec.forward_flops(self.config, tokens)

    def widths(self) -> tuple[int, int]:
        """Of the residual stream and of the feed-forward hidden layer."""
        return self.config.dim, int(self.config.dim * self.config.mlp_ratio)


class CosmosTextToWorld(Cosmos):
    """Prompt -> video with a Predict 1 Text2World directory."""

    tasks: ClassVar[tuple[str, ...]] = ("t2v",)
    convention: ClassVar[Convention] = spec.CONVENTION_1
    preset: ClassVar[str] = "nvidia/Cosmos-1.0-Diffusion-7B-Text2World"

    def latent_stages(self) -> dict[str, Stage]:
        """Noise, and the frame rate for the strategy."""
        return {"rate": RateStage(), **super().latent_stages()}


class CosmosVideoToWorld(Cosmos):
    """Prompt and an image or a video -> its continuation, with a Predict 1 Video2World directory."""

    tasks: ClassVar[tuple[str, ...]] = ("i2v", "vc")
    convention: ClassVar[Convention] = spec.CONVENTION_1
    preset: ClassVar[str] = "nvidia/Cosmos-1.0-Diffusion-7B-Video2World"
    extra_defaults: ClassVar[Mapping[str, Any]] = {"augment_sigma": 0.001, "input_frames_guidance": False}
    unread: ClassVar[tuple[Unread, ...]] = (
        *ComposedPipeline.unread,
        Unread(("input_frames_guidance",), ONE_ROW.why, ONE_ROW.when),
    )

    @property
    def inputs(self) -> Mapping[str, bool]:
        """An image or a video; the latents stage wants one of them."""
        return {"image": False, "video": False}

    def latent_stages(self) -> dict[str, Stage]:
        """Noise and given frames."""
        return self.frames_stage(Predict1FramesStage)


class _Predict2(Cosmos):
    convention: ClassVar[Convention] = spec.CONVENTION_2

    def make_scheduler(self) -> SchedulerAdapter | Lazy[SchedulerAdapter]:
        """Predict 2's own noise levels."""
        return EDMAdapter(spec.SCHEDULE_2)


class Cosmos2TextToImage(_Predict2):
    """Prompt -> one frame with a Predict 2 Text2Image directory."""

    tasks: ClassVar[tuple[str, ...]] = ("t2i",)
    preset: ClassVar[str] = "nvidia/Cosmos-Predict2-2B-Text2Image"

    def make_geometry(self, vae: Mapping[str, Any], config: spec.CosmosConfig) -> VideoGeometry:
        """As the family's, for one frame."""
        made = super().make_geometry(vae, config)
        return ImageGeometry(made.spatial, made.temporal, made.patch, made.max_positions)


class Cosmos2VideoToWorld(_Predict2):
    """Prompt and an image or a video -> its continuation, with a Predict 2 Video2World directory."""

    tasks: ClassVar[tuple[str, ...]] = ("i2v", "vc")
    preset: ClassVar[str] = "nvidia/Cosmos-Predict2-2B-Video2World"
    extra_defaults: ClassVar[Mapping[str, Any]] = {"sigma_conditioning": 0.0001}

    @property
    def inputs(self) -> Mapping[str, bool]:
        """An image or a video; the latents stage wants one of them."""
        return {"image": False, "video": False}

    def latent_stages(self) -> dict[str, Stage]:
        """Noise and given frames."""
        return self.frames_stage(Predict2FramesStage)


class Cosmos25Predict(Cosmos):
    """Prompt, and perhaps an image or a video -> video with a Predict 2.5 directory."""

    tasks: ClassVar[tuple[str, ...]] = ("t2v", "i2v", "vc")
    convention: ClassVar[Convention] = spec.CONVENTION_25
    preset: ClassVar[str] = "nvidia/Cosmos-Predict2.5-2B"
    text_modes: ClassVar[tuple[str, ...]] = ()
    extra_defaults: ClassVar[Mapping[str, Any]] = {
        "conditional_frame_timestep": 0.0001,
        "num_latent_conditional_frames": 2,
    }
    unread: ClassVar[tuple[Unread, ...]] = (
        *ComposedPipeline.unread,
        Unread(
            ("conditional_frame_timestep",),
            "is of given frames, and none are given; give image= or video=",
            lambda run: not run.inputs & {"image", "video"},
        ),
        Unread(
            ("num_latent_conditional_frames",),
            "is of a given video, and none is given; give video=",
            lambda run: "video" not in run.inputs,
        ),
    )

    @property
    def inputs(self) -> Mapping[str, bool]:
        """An image or a video, or neither."""
        return {"image": False, "video": False}

    def text_stage(self) -> Stage:
        """Qwen2.5-VL, all layers."""
        return AllLayersTextStage(
            self.lazy("tokenizer"), self.lazy("text_encoder"), spec.TEXT_LENGTH, spec.SYSTEM_PROMPT_25
        )

    def latent_stages(self) -> dict[str, Stage]:
        """Noise and given frames, if any."""
        return self.frames_stage(Predict25FramesStage)


class ImageGeometry(VideoGeometry):
    """The geometry of a model that makes single frames."""

    def check(self, params: SamplingParams) -> None:
        """As `VideoGeometry.check`, and one frame.

        Raises:
            InputError: size out of range or not a multiple, or more than one frame.
        """
        if params.num_frames != 1:
            raise InputError(f"num_frames={params.num_frames!r}: this model makes images, one frame")
        VideoGeometry.check(self, params)


register_transformer(
    "CosmosTransformer3DModel", CosmosTransformer3DModel, spec.CosmosConfig.from_dict, plan=spec.SHARDING
)
register_transformers_model("Qwen2_5_VLForConditionalGeneration")
for _tokenizer in ("Qwen2Tokenizer", "Qwen2TokenizerFast"):
    register_tokenizer(_tokenizer)
