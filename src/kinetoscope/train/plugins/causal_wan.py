"""Causal Wan (self-forcing)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from kinetoscope.diffusion.convention import Convention
from kinetoscope.engine.strategies.causal import plan_blocks
from kinetoscope.models.wan.spec import CONVENTION
from kinetoscope.nn.ring_cache import RingCache
from kinetoscope.train.roles import CausalModelBase


class CausalWanModel(CausalModelBase):
    """Wan block by block."""

    convention: ClassVar[Convention] = CONVENTION

    def __init__(self, transformer: nn.Module, **options: Any) -> None:
        super().__init__(transformer, **options)
        self._causal: Any = transformer

    def blocks(self, frames: int) -> tuple[int, ...]:
        """As inference divides a video."""
        config = self._causal.config
        return tuple(plan_blocks(frames, config.num_frames_per_block, config.independent_first_frame))

    def new_cache(self, x: Tensor) -> RingCache:
        return self._causal.new_cache(x.shape[0], x.shape)
