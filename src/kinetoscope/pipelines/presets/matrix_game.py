"""Matrix-Game 2: an image and actions to video, in one go or played block by block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from kinetoscope.core.errors import ConfigError
from kinetoscope.core.types import ForwardBatch, SamplingParams
from kinetoscope.diffusion.scheduler import SchedulerAdapter
from kinetoscope.engine.engine import DenoisingEngine
from kinetoscope.engine.strategies.matrix_game import Actions, MatrixGameStrategy
from kinetoscope.loading import register_transformer
from kinetoscope.loading.transformers_models import register_transformers_model
from kinetoscope.models.matrix_game import spec
from kinetoscope.models.matrix_game.strategy import MatrixGameVideoStrategy
from kinetoscope.models.matrix_game.transformer import MatrixGameTransformer3DModel
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.pipelines.stages.decoding import DecodingStage
from kinetoscope.pipelines.stages.denoising import DenoisingStage
from kinetoscope.pipelines.stages.images import ImageConditionStage
from kinetoscope.pipelines.stages.latents import LatentPreparationStage
from kinetoscope.pipelines.stages.matrix_game import (
    ACTIONS,
    ActionStage,
    FrameDecoder,
    PlayValidationStage,
    SquareImageFeatureStage,
)
from kinetoscope.pipelines.stages.validation import VideoGeometry

TRANSFORMERS = (
    "CausalMatrixGame2WanModel",
    "CausalMatrixGameWanModel",
    "CausalWanModel",
    "MatrixGame2WanModel",
    "MatrixGameWanModel",
)
"""Names under which the transformer is published; the third is the original repository's."""


class MatrixGameVideo(ComposedPipeline):
    """Image and action script (`actions=`) -> video with the foundation model, all frames at once.

    Prompts are not read. The solver is UniPC unless a request names another.
    """

    distilled: ClassVar[bool] = False
    required: ClassVar[tuple[str, ...]] = ("transformer", "vae", "image_encoder")
    tasks: ClassVar[tuple[str, ...]] = ("i2v",)
    attention_roles: ClassVar[tuple[str, ...]] = ("self", "cross", "mouse", "keyboard")

    @property
    def inputs(self) -> Mapping[str, bool]:
        """The first frame of the world."""
        return {"image": True}

    def create_stages(self) -> None:
        """Validation, actions, image features, image condition, denoising, decoding.

        Raises:
            ConfigError: a keyboard that no published layout has.
        """
        config = self.config = spec.MatrixGameConfig.from_dict(self.model.config("transformer"))
        keys = config.action.keyboard_dim_in
        if keys not in spec.LAYOUTS:
            raise ConfigError(f"Matrix-Game with {keys} keys; known keyboards have {', '.join(map(str, spec.LAYOUTS))}")
        self.layout = spec.LAYOUTS[keys]
        self.extra_defaults: Mapping[str, Any] = {  # pyright: ignore[reportIncompatibleVariableOverride]
            **(self.defaults().extra or {}),
            ACTIONS: None,
        }
        vae = self.model.config("vae")
        self.geometry = VideoGeometry(
            spatial=vae.get("scale_factor_spatial", 8),
            temporal=vae.get("scale_factor_temporal", 4),
            patch=config.patch_size,
            max_positions=config.rope_max_seq_len,
        )
        block = config.num_frames_per_block if self.distilled else 1
        self.add_stage("validation", PlayValidationStage(self.geometry, config.out_channels, block))
        self.add_stage("actions", ActionStage(self.layout))
        self.add_stage("image_features", SquareImageFeatureStage(self.lazy("image_encoder")))
        self.add_stage("image_condition", ImageConditionStage(self.lazy("vae"), self.geometry))
        self.add_denoising()
        self.add_stage("decoding", DecodingStage(self.lazy("vae")))

    def add_denoising(self) -> None:
        """Starting noise, then a scheduler."""
        solver = SchedulerAdapter("FlowMatchEulerDiscreteScheduler").override("unipc")
        self.add_stage("latents", LatentPreparationStage(self.geometry, self.config.out_channels))
        stage = DenoisingStage(self.lazy("transformer"), solver, MatrixGameVideoStrategy, self.hooks)
        self.add_stage("denoising", stage)

    def defaults(self) -> SamplingParams:
        """The directory's own defaults over the preset of its published name or of its keyboard."""
        preset = spec.PRESETS.get(self.model.name) or spec.preset_for(self.config, distilled=self.distilled)
        return SamplingParams(**self.model.defaults).over(preset)

    def forward_flops(self, tokens: int) -> float:
        """See `spec.forward_flops`."""
        return spec.forward_flops(self.config, tokens)


class MatrixGameWorld(MatrixGameVideo):
    """Image and action script (`actions=`) -> video with a distilled model, block by block; or a stream, see
    `open_stream`.

    Prompts are not read. There is no solver: the few steps are a list (`dmd_denoising_steps`).
    """

    distilled: ClassVar[bool] = True

    def add_denoising(self) -> None:
        """Blocks, with the noise of each."""
        unused = SchedulerAdapter("FlowMatchEulerDiscreteScheduler")
        self.add_stage("denoising", DenoisingStage(self.lazy("transformer"), unused, MatrixGameStrategy, self.hooks))

    def open_stream(self, batch: ForwardBatch) -> PlayStream:
        """Start a session from `batch.image`: everything up to denoising is done now, blocks come from the stream.

        `num_frames` of the parameters is how much of the condition is encoded; the session may last longer.

        Raises:
            InputError: see `PlayValidationStage`.
        """
        for name in ("validation", "image_features", "image_condition"):
            batch = self.stages[name].forward(batch, self.args)
        stage = self.stages["denoising"]
        assert isinstance(stage, DenoisingStage)
        return PlayStream(self, stage.engine(batch), batch)


class PlayStream:
    """A session: `step` makes the next block from what is done, `close` ends it. A context manager.

    Sessions of one pipeline may be interleaved; each has its own memory.
    """

    @torch.no_grad()
    def __init__(self, pipeline: MatrixGameWorld, engine: DenoisingEngine, batch: ForwardBatch) -> None:
        self.pipeline = pipeline
        self.batch = batch
        self.blocks = 0
        self._engine = engine
        self._stream = engine.streaming_reset(batch, pipeline.args)
        self._decoder = FrameDecoder(pipeline.get_module("vae"))

    @property
    def frames_needed(self) -> int:
        """Pixel frames of the next block: as many actions it needs, and as many frames come out."""
        strategy = self._engine.strategy
        assert isinstance(strategy, MatrixGameStrategy)
        return strategy.block_frames(self.blocks)

    @torch.no_grad()
    def latents(self, actions: Actions) -> Tensor:
        """The next block as normalised latents [B, C, t, h, w]; use either this or `step` in a session.

        Raises:
            InputError: the actions do not fit; the session is over then.
        """
        result = self._engine.streaming_step(self._stream, actions)
        self.blocks += 1
        return result

    def step(self, actions: Actions) -> list[Any]:
        """The next block as frames, one uint8 array [T, H, W, 3] a sample."""
        return self._decoder.decode(self.latents(actions))

    def close(self) -> None:
        """End the session and its hooks."""
        if not self._stream.closed:
            self._engine.streaming_clear(self._stream)

    def __enter__(self) -> PlayStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


for _name in TRANSFORMERS:
    register_transformer(_name, MatrixGameTransformer3DModel, spec.MatrixGameConfig.from_dict, key_map=spec.rename)
register_transformers_model("CLIPVisionModel")
