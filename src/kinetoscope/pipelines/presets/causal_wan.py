"""Causal Wan (self-forcing): text or image to video, block by block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from kinetoscope.attention import Role
from kinetoscope.core.errors import InputError
from kinetoscope.core.types import ForwardBatch, SamplingParams
from kinetoscope.engine.strategies.causal import CONTEXT_NOISE, SINK, WINDOW, CausalStrategy, block_sizes
from kinetoscope.engine.strategies.dmd import STEPS, WARP
from kinetoscope.loading import register_transformer
from kinetoscope.models.wan import original, spec
from kinetoscope.models.wan.causal import CausalWanConfig, CausalWanTransformer3DModel
from kinetoscope.models.wan.distilled import CAUSAL_PRESETS, DEFAULT_BOUNDARY
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.pipelines.presets.wan import TRAIN_TIMESTEPS
from kinetoscope.pipelines.stages import (
    DecodingStage,
    DenoisingStage,
    FirstFrameStage,
    InputValidationStage,
    TextEncodingStage,
    VideoGeometry,
)
from kinetoscope.pipelines.stages.few_step import BlockLatentStage, BlockValidationStage, FewStepTimestepStage


class CausalWan(ComposedPipeline):
    """Prompt, and perhaps a first image -> video, a block of latent frames at a time with a K/V cache.

    Of the directory's scheduler nothing is used but what the preset says. With two transformers (Wan 2.2), or with an
    image, the first latent frame is a block of its own, and frames that do not fill the last block are left out: of 81
    frames 73 are made, which is what the result's parameters and its record say.
    """

    required: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder", "transformer", "vae")
    tasks: ClassVar[tuple[str, ...]] = ("t2v", "i2v")
    text_tokens: ClassVar[int] = spec.TEXT_LENGTH
    attention_roles: ClassVar[tuple[str, ...]] = (Role("self"), Role("cross", key_bias=True))
    text_modes: ClassVar[tuple[str, ...]] = ("padded", "true_length")
    streams: ClassVar[bool] = True
    extra_defaults: ClassVar[Mapping[str, Any]] = {
        STEPS: [1000, 750, 500, 250],
        WARP: True,
        CONTEXT_NOISE: 0,
        WINDOW: None,  # None: the model's own
        SINK: None,
    }

    @property
    def inputs(self) -> Mapping[str, bool]:
        """A first image."""
        return {"image": False}

    def create_stages(self) -> None:
        """Validation, text, timesteps, latents, first frame, denoising, decoding."""
        config = self.config = CausalWanConfig.from_dict(self.model.config("transformer"))
        vae = self.model.config("vae")
        self.geometry = VideoGeometry.of(vae, config.patch_size, max_positions=config.rope_max_seq_len)
        boundary, steps = self._boundary(), {**self.extra_defaults, **(self.defaults().extra or {})}[STEPS]
        self.alone = config.independent_first_frame or boundary is not None
        self.add_stage("validation", InputValidationStage(self.geometry))
        self.add_stage("blocks", BlockValidationStage(self.geometry, config, self.alone))
        self.add_stage("timesteps", FewStepTimestepStage(steps, boundary))
        self.add_stage(
            "text_encoding",
            TextEncodingStage(self.lazy("tokenizer"), self.lazy("text_encoder"), spec.TEXT_LENGTH),
        )
        self.add_stage("latents", BlockLatentStage(self.geometry, vae.get("z_dim", config.out_channels)))
        self.add_stage("first_frame", FirstFrameStage(self.lazy("vae")))
        low = {} if boundary is None else {"transformer_2": self.lazy("transformer_2"), "boundary": boundary}
        unused: Any = None  # no scheduler: the schedule is the student's list
        self.add_stage(
            "denoising", DenoisingStage(self.lazy("transformer"), unused, CausalStrategy, hooks=self.hooks, **low)
        )
        self.add_stage("decoding", DecodingStage(self.lazy("vae")))

    def block_latents(self, batch: ForwardBatch, index: int) -> int:
        """Those of a regular block, but for a first image, or a first frame that is a block of its own."""
        size = self.config.num_frames_per_block
        first = block_sizes(size, self.alone, given=int(batch.image is not None))
        return first[index] if index < len(first) else size

    def check_blocks(self, batch: ForwardBatch, blocks: int) -> None:
        """Without a rolling window a video is at most as long as those the model was trained on.

        Raises:
            InputError: see `ComposedPipeline.check_blocks`.
        """
        config, window = self.config, (batch.params.extra or {}).get(WINDOW)
        frames, limit = 0, config.sliding_window_num_frames
        for index in range(blocks if (config.local_attn_size if window is None else window) == -1 else 0):
            frames += self.block_latents(batch, index)
            if frames > limit:
                raise InputError(
                    f"blocks={blocks} are more than the {index} ({limit} latent frames) that this model was trained to "
                    f"see at once; set {WINDOW} for a rolling window"
                )

    def _boundary(self) -> float | None:
        """Timestep between the experts, where the directory has two."""
        if "transformer_2" not in self.model.components():
            return None
        return self.model.model_index.get("boundary_ratio", DEFAULT_BOUNDARY) * TRAIN_TIMESTEPS

    def defaults(self) -> SamplingParams:
        """The directory's own defaults over the preset of its published name, or of the model it is like."""
        like = "wlsaidhi/SFWan2.1-T2V-1.3B" if self._boundary() is None else "rand0nmr/SFWan2.2-T2V-A14B"
        preset = CAUSAL_PRESETS.get(self.model.name) or CAUSAL_PRESETS[f"{like}-Diffusers"]
        return SamplingParams(**self.model.defaults).over(preset)

    def forward_flops(self, tokens: int) -> float:
        """As Wan's over the whole video: an upper bound, since a block sees only what was made before it."""
        return spec.forward_flops(self.config, tokens)

    def widths(self) -> tuple[int, int]:
        """Of the residual stream and of the feed-forward hidden layer."""
        return self.config.dim, self.config.ffn_dim


register_transformer(
    "CausalWanTransformer3DModel",
    CausalWanTransformer3DModel,
    CausalWanConfig.from_dict,
    key_map=original.rename,
    plan=spec.SHARDING,
)
