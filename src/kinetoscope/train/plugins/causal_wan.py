"""Causal Wan (self-forcing)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from kinetoscope.core.types import ForwardBatch
from kinetoscope.diffusion.convention import Convention
from kinetoscope.engine.strategies.causal import CausalStrategy, LatentVideo, plan_blocks
from kinetoscope.models.wan.spec import CONVENTION
from kinetoscope.nn.ring_cache import RingCache
from kinetoscope.train.roles import CausalModelBase, TrainBatch


class CausalWanModel(CausalModelBase):
    """Wan block by block."""

    convention: ClassVar[Convention] = CONVENTION
    strategy: ClassVar[type[Any]] = CausalStrategy

    def __init__(self, transformer: nn.Module, **options: Any) -> None:
        super().__init__(transformer, **options)
        self._causal: Any = transformer

    def blocks(self, frames: int) -> tuple[int, ...]:
        """As inference divides a video."""
        config = self._causal.config
        return tuple(plan_blocks(frames, config.num_frames_per_block, config.independent_first_frame))

    def new_cache(self, x: Tensor) -> RingCache:
        return self._causal.new_cache(x.shape[0], x.shape, devices=self.devices)

    def tell(self, request: ForwardBatch, batch: TrainBatch) -> None:
        request.prompt_embeds, request.prompt_lengths = batch.text.states, batch.text.lengths
        _, channels, frames, height, width = batch.latents.shape
        request.family = LatentVideo(channels, height, width, frames)
