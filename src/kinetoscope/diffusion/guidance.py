"""Which rows a step needs, and how their predictions become one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from kinetoscope.core.errors import InputError

UNCOND, COND = "uncond", "cond"


@dataclass(frozen=True, slots=True)
class Guidance:
    """Classifier-free guidance (arXiv 2207.12598), combined in float32.

    Attributes:
        scale: w in u + w (c - u), at least 1; 1 needs no unconditional row.
        rescale: phi of arXiv 2305.08891, section 3.4: the guided prediction is scaled to the standard deviation of the
            conditional one and mixed in by this fraction.

    Raises:
        InputError: a value outside its range.
    """

    scale: float = 1.0
    rescale: float = 0.0

    def __post_init__(self) -> None:
        if not self.scale >= 1.0:
            raise InputError(f"guidance_scale={self.scale} is below 1; use 1 to switch guidance off")
        if not 0.0 <= self.rescale <= 1.0:
            raise InputError(f"guidance_rescale={self.rescale} is outside [0, 1]")

    @property
    def branches(self) -> tuple[str, ...]:
        """The branches a step must evaluate, in row order."""
        return (UNCOND, COND) if self.scale != 1.0 else (COND,)

    def combine(self, predictions: Mapping[str, Tensor]) -> Tensor:
        """One prediction [B, ...] float32 from the prediction of each branch [B, ...]."""
        cond = predictions[COND].float()
        if self.scale == 1.0:
            return cond
        uncond = predictions[UNCOND].float()
        guided = uncond + self.scale * (cond - uncond)
        if self.rescale == 0.0:
            return guided
        axes = tuple(range(1, guided.ndim))
        matched = guided * (cond.std(axes, keepdim=True) / guided.std(axes, keepdim=True))
        return self.rescale * matched + (1.0 - self.rescale) * guided


def cfg_zero_scale(cond: Tensor, uncond: Tensor) -> Tensor:
    """How much of `uncond` lies along `cond`: <c, u> / (|u|^2 + 1e-8) a sample (arXiv 2503.18886, equation 7).

    CFG-Zero* is classifier-free guidance with the unconditional prediction times this.

    Args:
        cond, uncond: [B, ...] float32.

    Returns:
        [B, 1, ...], to multiply `uncond` with.
    """
    axes = tuple(range(1, cond.ndim))
    return (cond * uncond).sum(axes, keepdim=True) / (uncond.square().sum(axes, keepdim=True) + 1e-8)
