"""Matrix-Game 2: worlds that are played, block by block, and foundation models that make whole videos.

A batch brings, in `TrainBatch.extra`, what the pipeline makes of a request: "condition" [B, C', T, h, w] and
"image_embeds" [B, I, D] of the first frame (`first_view` makes them), and what is done in each pixel frame: "keyboard"
[B, P, K] and, for models with one, "mouse" [B, P, 2]; P = 1 + 4 (T - 1).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kinetoscope.core.errors import ConfigError, InputError
from kinetoscope.core.types import ForwardBatch, SamplingParams
from kinetoscope.diffusion.convention import Convention
from kinetoscope.engine.strategies.matrix_game import Actions, MatrixGameStrategy
from kinetoscope.models.matrix_game.config import MatrixGameConfig
from kinetoscope.models.matrix_game.spec import CONVENTION
from kinetoscope.nn.action import action_windows, pad_actions
from kinetoscope.pipelines.composed import ComposedPipeline
from kinetoscope.train.roles import CausalModelBase, ModelBase, Text, TrainBatch


@torch.no_grad()
def first_view(pipeline: ComposedPipeline, images: Tensor, frames: int) -> dict[str, Tensor]:
    """What a Matrix-Game network is told of first frames, by the stages that a played world tells it by.

    Args:
        pipeline: of the model.
        images: [B, 3, H, W] in [-1, 1].
        frames: pixel frames P of the videos that begin with them.

    Returns:
        "condition" [B, C', T, h, w] and "image_embeds" [B, I, D], float32.
    """
    rows, height, width = len(images), *images.shape[-2:]
    params = SamplingParams(height=height, width=width, num_frames=frames)
    batch = ForwardBatch(params, [""] * rows, [""] * rows, [0] * rows, image=images)
    for name in ("image_features", "image_condition"):
        batch = pipeline.stages[name].forward(batch, pipeline.args)
    assert batch.condition is not None and batch.image_embeds is not None
    return {"condition": batch.condition.float(), "image_embeds": batch.image_embeds.float()}


class MatrixGameVideoModel(ModelBase):
    """The foundation model: all frames see each other."""

    convention: ClassVar[Convention] = CONVENTION
    has_unconditional: ClassVar[bool] = False

    def __init__(self, transformer: nn.Module, **options: Any) -> None:
        """
        Raises:
            ConfigError: sparse attention.
        """
        super().__init__(transformer, **options)
        if self._attention:
            raise ConfigError("Matrix-Game attends densely; set attention=dense")
        self._network: Any = transformer

    @property
    def config(self) -> MatrixGameConfig:
        """Of the transformer."""
        return self._network.config

    def conditioning(self, batch: TrainBatch, conditional: bool, frames: slice | None = None) -> dict[str, Any]:
        """Condition and actions of the frames, and the image."""
        self.text_of(batch, conditional)
        extra, action, part = self.extra(batch), self.config.action, frames or slice(None)
        told = {"condition": extra["condition"][:, :, part], "image_embeds": extra["image_embeds"]}
        for name in extra.keys() & {"keyboard", "mouse"}:
            padded = pad_actions(extra[name], action.window)
            told[name] = action_windows(padded, action.vae_time_compression_ratio, action.window)[:, part]
        return told

    def text_of(self, batch: TrainBatch, conditional: bool) -> Text:
        """None is read.

        Raises:
            ConfigError: the unconditional branch, which there is not.
        """
        if not conditional:
            raise ConfigError(
                "Matrix-Game reads no text and has no unconditional branch; set method.caption_dropout=0, and "
                "method.guidance=1 where the method has it"
            )
        return batch.text

    def extra(self, batch: TrainBatch) -> dict[str, Tensor]:
        """What the batch brings for this network.

        Raises:
            InputError: something is missing.
        """
        names = ["condition", "image_embeds", "keyboard", *(["mouse"] if self.config.action.enable_mouse else [])]
        if missing := [name for name in names if name not in batch.extra]:
            raise InputError(
                f"a batch for a Matrix-Game model brings {', '.join(names)} beside its latents; this one has no "
                f"{', '.join(missing)}: set data.source to one of played clips"
            )
        return {name: batch.extra[name] for name in names}


class MatrixGameModel(MatrixGameVideoModel, CausalModelBase):
    """A world that is played: blocks, each seeing earlier ones through a memory."""

    strategy: ClassVar[type[Any]] = MatrixGameStrategy
    memory: ClassVar[str] = "memory"

    def blocks(self, frames: int) -> tuple[int, ...]:
        """All alike.

        Raises:
            InputError: the frames are no whole number of them.
        """
        size = self.config.num_frames_per_block
        if frames % size:
            raise InputError(f"{frames} latent frames are no whole number of blocks of {size}")
        return (size,) * (frames // size)

    def new_cache(self, x: Tensor) -> Any:
        return self._network.new_memory(x.shape[0], x.shape, devices=self.devices)

    def tell(self, request: ForwardBatch, batch: TrainBatch) -> None:
        extra = self.extra(batch)
        request.condition, request.image_embeds = extra["condition"], extra["image_embeds"]
        request.family = Actions(extra["keyboard"], extra.get("mouse"))
