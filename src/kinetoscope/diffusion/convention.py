"""How a family of diffusion models speaks, as data.

One `Convention` value says what the network predicts, how a noisy sample is made from a clean one, and how time is
scaled. `Denoiser` is the only reader, so training and sampling cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Prediction = Literal["flow", "epsilon", "v", "x0"]


@dataclass(frozen=True, slots=True)
class Convention:
    """The numerical language of a family.

    With noise level s in [0, 1] a sample is `x_s = alpha(s) x0 + s n`: `interpolant="linear"` has alpha = 1 - s
    (rectified flow, arXiv 2209.03003), `"cosine"` has alpha = sqrt(1 - s^2) (variance preserving).

    Attributes:
        prediction: what the network returns: "flow" is n - x0, "epsilon" is n, "x0" is x0, "v" is alpha n - s x0
            (arXiv 2202.00512).
        sign: multiplies the network's output before it is read as `prediction` (LongCat-Video predicts the negative).
        interpolant: see above.
        timestep_scale: the network is called at timestep = s * timestep_scale.
        default_shift: the sigma shift the family is sampled and trained with unless a directory says otherwise.
    """

    prediction: Prediction = "flow"
    sign: int = 1
    interpolant: Literal["linear", "cosine"] = "linear"
    timestep_scale: float = 1000.0
    default_shift: float = 1.0

    def alpha(self, s: Tensor) -> Tensor:
        """Scale of the clean sample at noise level `s` (any shape)."""
        return 1.0 - s if self.interpolant == "linear" else (1.0 - s * s).clamp_min(0).sqrt()


def shift_sigma(s: Tensor, shift: float) -> Tensor:
    """Shifted noise level `shift s / (1 + (shift - 1) s)` (arXiv 2403.03206, section 5.3.2)."""
    return shift * s / (1 + (shift - 1) * s)
