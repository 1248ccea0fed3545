"""Matrix-Game 2: an image and actions to video, in one go or played block by block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from kinetoscope.attention import Role
from kinetoscope.core.errors import ConfigError
from kinetoscope.core.types import ForwardBatch, SamplingParams
from kinetoscope.diffusion.scheduler import SchedulerAdapter
from kinetoscope.engine.strategies.dmd import STEPS
from kinetoscope.engine.strategies.matrix_game import Actions, MatrixGameStrategy
from kinetoscope.loading import register_transformer
from kinetoscope.loading.transformers_models import register_transformers_model
from kinetoscope.media.actions import load_actions, play
from kinetoscope.models.matrix_game import spec
from kinetoscope.models.matrix_game.strategy import MatrixGameVideoStrategy
from kinetoscope.models.matrix_game.transformer import MatrixGameTransformer3DModel
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.pipelines.stages.decoding import DecodingStage
from kinetoscope.pipelines.stages.denoising import DenoisingStage
from kinetoscope.pipelines.stages.few_step import FewStepTimestepStage
from kinetoscope.pipelines.stages.latents import LatentPreparationStage
from kinetoscope.pipelines.stages.matrix_game import (
    ACTIONS,
    ActionStage,
    PlayConditionStage,
    PlayedStream,
    PlayValidationStage,
    SquareImageFeatureStage,
    as_actions,
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
    guided: ClassVar[bool] = False
    text_tokens: ClassVar[int] = spec.IMAGE_TOKENS
    attention_roles: ClassVar[tuple[str, ...]] = tuple(map(Role, ("self", "cross", "mouse", "keyboard")))
    text_modes: ClassVar[tuple[str, ...]] = ()

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
        self.geometry = VideoGeometry.of(vae, config.patch_size, max_positions=config.rope_max_seq_len)
        block = config.num_frames_per_block if self.distilled else 1
        self.add_stage("validation", PlayValidationStage(self.geometry, config.out_channels, block))
        self.add_stage("actions", ActionStage(self.layout))
        self.add_stage("image_features", SquareImageFeatureStage(self.lazy("image_encoder")))
        self.add_stage("image_condition", PlayConditionStage(self.lazy("vae"), self.geometry, block))
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

    def widths(self) -> tuple[int, int]:
        """Of the residual stream and of the feed-forward hidden layer."""
        return self.config.dim, self.config.ffn_dim


class MatrixGameWorld(MatrixGameVideo):
    """Image and action script (`actions=`) -> video with a distilled model, block by block; or a stream.

    Prompts are not read. There is no solver: the few steps are a list (`dmd_denoising_steps`).
    """

    distilled: ClassVar[bool] = True
    streams: ClassVar[bool] = True
    block_inputs: ClassVar[tuple[str, ...]] = ("keyboard", "mouse")

    def add_denoising(self) -> None:
        """Blocks, with the noise of each."""
        unused = SchedulerAdapter("FlowMatchEulerDiscreteScheduler")
        self.add_stage("timesteps", FewStepTimestepStage((self.defaults().extra or {})[STEPS]), after="validation")
        self.add_stage("denoising", DenoisingStage(self.lazy("transformer"), unused, MatrixGameStrategy, self.hooks))

    def block_latents(self, batch: ForwardBatch, index: int) -> int:
        """All blocks are alike."""
        return self.config.num_frames_per_block

    def block_item(
        self, batch: ForwardBatch, index: int, *, keyboard: Any = None, mouse: Any = None, **inputs: Any
    ) -> Actions:
        """What the player does in the block (see `media.actions.play`); of the script where nothing is said.

        Raises:
            InputError: see `media.actions.play`; or the script has ended.
        """
        stream, frames = batch.family, self.block_frames(batch, index)
        assert isinstance(stream, PlayedStream)
        start = 0 if index == 0 else self.block_frames(batch, 0) + (index - 1) * frames
        if keyboard is None and mouse is None and stream.script is not None:
            script = stream.script.part(start, start + frames)
        else:
            script = play(self.layout, frames, keyboard, mouse)
        stream.reach(batch, (index + 1) * self.config.num_frames_per_block)
        return as_actions(script, batch.size)

    def check_blocks(self, batch: ForwardBatch, blocks: int) -> None:
        """A script must last as long as the stream.

        Raises:
            InputError: see `media.actions.load_actions`; or it does not.
        """
        source = (batch.params.extra or {}).get(ACTIONS)
        if source is not None:
            frames = self.block_frames(batch, 0) + (blocks - 1) * self.block_frames(batch, 1)
            load_actions(source, self.layout).first(frames)


for _name in TRANSFORMERS:
    register_transformer(
        _name,
        MatrixGameTransformer3DModel,
        spec.MatrixGameConfig.from_dict,
        key_map=spec.rename,
        plan=spec.SHARDING,
    )
register_transformers_model("CLIPVisionModel")
