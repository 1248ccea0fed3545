"""Wan 2.1 text-to-video."""

from __future__ import annotations

from typing import Any, ClassVar

from kinetoscope.core.types import SamplingParams
from kinetoscope.loading import ModelDir, register_transformer
from kinetoscope.models.wan import spec
from kinetoscope.models.wan.transformer import WanTransformer3DModel
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


class WanTextToVideo(ComposedPipeline):
    """Prompt -> video with a Wan 2.1 T2V directory."""

    required: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    tasks: ClassVar[tuple[str, ...]] = ("t2v",)
    attention_roles: ClassVar[tuple[str, ...]] = ("self", "cross")

    def create_stages(self) -> None:
        """Validation, text, timesteps, latents, denoising, decoding."""
        config = self.config = spec.WanConfig.from_dict(self.model.config("transformer"))
        vae = self.model.config("vae")
        self.geometry = VideoGeometry(
            spatial=vae.get("scale_factor_spatial", 8),
            temporal=vae.get("scale_factor_temporal", 4),
            patch=config.patch_size,
            max_positions=config.rope_max_seq_len,
        )
        self.add_stage("validation", InputValidationStage(self.geometry))
        self.add_stage(
            "text_encoding",
            TextEncodingStage(self.lazy("tokenizer"), self.lazy("text_encoder"), spec.TEXT_LENGTH),
        )
        self.add_stage("timesteps", TimestepPreparationStage(self.lazy("scheduler")))
        self.add_stage("latents", LatentPreparationStage(self.geometry, config.in_channels))
        self.add_stage("denoising", DenoisingStage(self.lazy("transformer"), self.lazy("scheduler"), hooks=self.hooks))
        self.add_stage("decoding", DecodingStage(self.lazy("vae")))

    def defaults(self) -> SamplingParams:
        """The directory's own defaults over the preset of its published name or size."""
        return sampling_defaults(self.model)

    def forward_flops(self, tokens: int) -> float:
        """See `spec.forward_flops`; the text counts at its padded length."""
        return spec.forward_flops(self.config, tokens)


def sampling_defaults(model: ModelDir) -> SamplingParams:
    """Defaults in the directory's sidecar, else of the published model it is, by name or by width."""
    wide = spec.WanConfig.from_dict(model.config("transformer")).num_layers >= 40
    by_size = "Wan-AI/Wan2.1-T2V-14B-Diffusers" if wide else "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    preset: SamplingParams = spec.PRESETS.get(model.name, spec.PRESETS[by_size])
    shipped = {"flow_shift": None, "scheduler": None}  # the directory's scheduler_config.json knows these
    own: dict[str, Any] = model.defaults
    return SamplingParams(**own).over(SamplingParams(**{**_as_dict(preset), **shipped}))


def _as_dict(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in SamplingParams.__dataclass_fields__}


register_transformer(
    "WanTransformer3DModel",
    WanTransformer3DModel,
    spec.WanConfig.from_dict,
    optional={"compress_gates": "to_gate_compress"},
)
