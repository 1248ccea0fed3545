"""Wan 2.1 and 2.2: text, image, first and last image, or video to video; videos to follow, cameras."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from kinetoscope.attention import Role
from kinetoscope.core.errors import ConfigError
from kinetoscope.core.types import SamplingParams
from kinetoscope.engine.strategies.experts import ExpertStrategy
from kinetoscope.engine.strategies.standard import StandardStrategy
from kinetoscope.loading import ModelDir, register_transformer
from kinetoscope.loading.transformers_models import register_image_processor, register_transformers_model
from kinetoscope.models.wan import original, spec
from kinetoscope.models.wan.strategy import ControlStrategy, FirstFrameStrategy
from kinetoscope.models.wan.transformer import WanTransformer3DModel
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.pipelines.stages import (
    DecodingStage,
    DenoisingStage,
    FirstFrameStage,
    ImageConditionStage,
    ImageFeatureStage,
    InputValidationStage,
    LatentPreparationStage,
    NoisedVideoStage,
    TextEncodingStage,
    TimestepPreparationStage,
    VideoGeometry,
)
from kinetoscope.pipelines.stages.wan_control import (
    CAMERA,
    REFERENCE,
    CameraStage,
    ControlConditionStage,
    ControlFeatureStage,
    ReferenceStage,
)

TRAIN_TIMESTEPS = 1000


class WanTextToVideo(ComposedPipeline):
    """Prompt -> video, from noise or from a given video (`video=`, `strength=`).

    A directory with `boundary_ratio` has two transformers (Wan 2.2 A14B). One with `expand_timesteps` also takes a
    first image (TI2V).
    """

    required: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    tasks: ClassVar[tuple[str, ...]] = ("t2v", "v2v")
    text_tokens: ClassVar[int] = spec.TEXT_LENGTH
    attention_roles: ClassVar[tuple[str, ...]] = (Role("self", grid=True), Role("cross", key_bias=True))
    text_modes: ClassVar[tuple[str, ...]] = ("padded", "true_length")

    @property
    def frame_wise(self) -> bool:
        """Whether time is told frame by frame, so that a first frame can be given (TI2V)."""
        return bool(self.model.model_index.get("expand_timesteps"))

    @property
    def inputs(self) -> Mapping[str, bool]:
        """A video to start from, or a first image where the model can keep one."""
        return {"video": False} | ({"image": False} if self.frame_wise else {})

    def create_stages(self) -> None:
        """Validation, text, timesteps, latents, conditions, denoising, decoding."""
        config = self.config = original.read_config(self.model.config("transformer"))
        vae = self.model.config("vae")
        self.geometry = VideoGeometry.of(vae, config.patch_size, max_positions=config.rope_max_seq_len)
        self.add_stage("validation", InputValidationStage(self.geometry, keeps_image=self.frame_wise))
        self.add_stage(
            "text_encoding",
            TextEncodingStage(self.lazy("tokenizer"), self.lazy("text_encoder"), spec.TEXT_LENGTH),
        )
        self.add_stage("timesteps", TimestepPreparationStage(self.lazy("scheduler")))
        self.add_stage("latents", LatentPreparationStage(self.geometry, vae.get("z_dim", config.out_channels)))
        self.add_condition_stages()
        self.add_stage("denoising", self.denoising_stage())
        self.add_stage("decoding", DecodingStage(self.lazy("vae")))

    def add_condition_stages(self) -> None:
        """What images and videos add."""
        self.add_stage("noised_video", NoisedVideoStage(self.lazy("vae"), self.lazy("scheduler")))
        if self.frame_wise:
            self.add_stage("first_frame", FirstFrameStage(self.lazy("vae")))

    def denoising_stage(self) -> DenoisingStage:
        """With one transformer or two, as the directory says."""
        index = self.model.model_index
        parts = (self.lazy("transformer"), self.lazy("scheduler"))
        if (ratio := index.get("boundary_ratio")) is not None:
            low = self.lazy("transformer_2")
            return DenoisingStage(
                *parts, ExpertStrategy, self.hooks, transformer_2=low, boundary=ratio * TRAIN_TIMESTEPS
            )
        strategy = FirstFrameStrategy if self.frame_wise else StandardStrategy
        return DenoisingStage(*parts, strategy, self.hooks)

    def defaults(self) -> SamplingParams:
        """The directory's own defaults over the preset of its published name or size."""
        return sampling_defaults(self.model)

    @classmethod
    def teacache_coefficients(cls, model: ModelDir) -> Sequence[float] | None:
        """Of Wan 2.1 as published: not of distilled and control models, which have the same sizes."""
        if cls not in (WanTextToVideo, WanImageToVideo, WanVideoToVideo) or model.model_index.get("expand_timesteps"):
            return None
        return spec.teacache_coefficients(model.name, original.read_config(model.config("transformer")))

    def forward_flops(self, tokens: int) -> float:
        """See `spec.forward_flops`; the text counts at its padded length."""
        return spec.forward_flops(self.config, tokens)

    def widths(self) -> tuple[int, int]:
        """Of the residual stream and of the feed-forward hidden layer."""
        return self.config.dim, self.config.ffn_dim


class WanImageToVideo(WanTextToVideo):
    """Image (and last image) and prompt -> video."""

    tasks: ClassVar[tuple[str, ...]] = ("i2v", "flf2v")

    @property
    def inputs(self) -> Mapping[str, bool]:
        """The image; the last one too where the model has positions for the features of both, or reads no features."""
        if self.frame_wise or (self.config.image_dim is not None and self.config.pos_embed_seq_len is None):
            return {"image": True}
        return {"image": True, "last_image": self.config.pos_embed_seq_len is not None}

    def add_condition_stages(self) -> None:
        """Features of the image where the transformer reads them; condition latents."""
        if self.config.image_dim is not None:
            features = ImageFeatureStage(self.lazy("image_processor"), self.lazy("image_encoder"))
            self.add_stage("image_features", features)
        if self.frame_wise:
            self.add_stage("first_frame", FirstFrameStage(self.lazy("vae")))
        else:
            self.add_stage("image_condition", ImageConditionStage(self.lazy("vae"), self.geometry))


class WanVideoToVideo(WanTextToVideo):
    """Video and prompt -> video."""

    tasks: ClassVar[tuple[str, ...]] = ("v2v",)

    @classmethod
    def variant(cls, model: ModelDir) -> type[ComposedPipeline]:
        """Models with channels for a video follow it; others start from it."""
        config = original.read_config(model.config("transformer"))
        return WanControl.variant(model) if config.in_channels > config.out_channels else cls

    @property
    def inputs(self) -> Mapping[str, bool]:
        """The video is required."""
        return {"video": True}


class WanControl(WanTextToVideo):
    """Prompt and a video to follow, of edges, depths, poses or the like (`video=`) -> video (Wan2.1-Fun Control).

    An image is the first frame. Models with a layer for it also take a picture to be like (`ref_image=`, a path).
    """

    tasks: ClassVar[tuple[str, ...]] = ("control",)
    extra_defaults: ClassVar[Mapping[str, Any]] = {REFERENCE: None}
    follows: ClassVar[bool] = True

    @classmethod
    def variant(cls, model: ModelDir) -> type[ComposedPipeline]:
        """Models with an adapter for it are told the camera; others follow a video."""
        return WanCamera if original.read_config(model.config("transformer")).add_control_adapter else cls

    @property
    def inputs(self) -> Mapping[str, bool]:
        """The video to follow; a first frame if wanted."""
        return {"video": True, "image": False}

    def add_condition_stages(self) -> None:
        """The picture to be like, features of a picture, condition latents."""
        config = self.config
        shown = 2 if self.follows else 1  # videos on channels beside the noisy one
        if config.in_channels != (1 + shown) * config.out_channels:
            raise ConfigError(
                f"{self.model.path}: in_channels={config.in_channels} of a control model should be "
                f"{(1 + shown) * config.out_channels}: the sample and {shown} of out_channels={config.out_channels}"
            )
        reference = config.add_ref_conv
        self.add_stage("reference", ReferenceStage(readable=reference), after="validation")
        if config.image_dim is not None:
            vision = self.model.config("image_encoder")
            tokens = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
            parts = (self.lazy("image_processor"), self.lazy("image_encoder"))
            self.add_stage("image_features", ControlFeatureStage(*parts, (tokens, config.image_dim)))
        condition = ControlConditionStage(self.lazy("vae"), follows=self.follows, reference=reference)
        self.add_stage("control_condition", condition)

    def denoising_stage(self) -> DenoisingStage:
        """Wan's, told of what is added to the tokens."""
        return DenoisingStage(self.lazy("transformer"), self.lazy("scheduler"), ControlStrategy, self.hooks)


class WanCamera(WanControl):
    """Prompt, first frame and a camera (`camera=`, see `media.camera`) -> video (Wan2.1-Fun Control-Camera)."""

    tasks: ClassVar[tuple[str, ...]] = ("camera",)
    extra_defaults: ClassVar[Mapping[str, Any]] = {CAMERA: None, REFERENCE: None}
    follows: ClassVar[bool] = False

    @property
    def inputs(self) -> Mapping[str, bool]:
        """A first frame if wanted."""
        return {"image": False}

    def add_condition_stages(self) -> None:
        """Those of a model without a video to follow, and the camera."""
        super().add_condition_stages()
        config, geometry = self.config, self.geometry
        told = (config.in_dim_control_adapter, config.downscale_factor_control_adapter)
        if told != (6 * geometry.temporal, geometry.spatial):
            raise ConfigError(
                f"{self.model.path}: in_dim_control_adapter and downscale_factor_control_adapter are {told}; with this "
                f"VAE they should be {(6 * geometry.temporal, geometry.spatial)}"
            )
        self.add_stage("camera", CameraStage(geometry.temporal), after="validation")


def sampling_defaults(model: ModelDir) -> SamplingParams:
    """Defaults in the directory's sidecar, else of the published model it is, by name or by its sizes."""
    config = original.read_config(model.config("transformer"))
    presets = {**spec.PRESETS, **spec.FUN_PRESETS}
    preset = presets.get(model.name) or presets[spec.nearest_preset(config, model.model_index)]
    shipped = {"flow_shift": None, "scheduler": None}  # the directory's scheduler_config.json knows these
    own: dict[str, Any] = model.defaults
    return SamplingParams(**own).over(SamplingParams(**{**_as_dict(preset), **shipped}))


def _as_dict(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in SamplingParams.__dataclass_fields__}


register_transformer(
    "WanTransformer3DModel",
    WanTransformer3DModel,
    original.read_config,
    optional={"compress_gates": "to_gate_compress"},
    key_map=original.rename,
    plan=spec.SHARDING,
)
register_transformers_model("CLIPVisionModel")
for _processor in ("CLIPImageProcessor", "CLIPImageProcessorPil"):
    register_image_processor(_processor)
