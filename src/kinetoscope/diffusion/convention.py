"""How a family of diffusion models speaks, as data.

One `Convention` value says what the network predicts, how a noisy sample is made from a clean one, and how time is
scaled. `Denoiser` is the only reader, so training and sampling cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kinetoscope.core.errors import ConfigError

Prediction = Literal["flow", "epsilon", "v", "x0", "edm"]


@dataclass(frozen=True, slots=True)
class Preconditioning:
    """A network inside scalings of its input, its output and its noise level (EDM, arXiv 2206.00364, table 1).

    With noise level s in [0, inf) a sample is `x = x0 + s n`, and `x0 = c_skip x + c_out network(c_in x, c_noise)`.

    Attributes:
        sigma_data: standard deviation of the clean samples.
        levels: lowest and highest noise level that the network knows (table 1: sigma_min, sigma_max).
        flow: the form in which the network is a rectified flow (sigma_data is 1): with t = s / (1 + s) the scaled input
            x / (1 + s) is the flow's sample at t, the network is called at t, and its output is n - x0.
    """

    sigma_data: float = 0.5
    flow: bool = False
    levels: tuple[float, float] = (0.002, 80.0)

    def c_in(self, s: Tensor) -> Tensor:
        """Scale of the network's input at noise level `s`."""
        if self.flow:
            return 1 - s / (s + 1)
        return (s * s + self.sigma_data**2).rsqrt()

    def c_skip(self, s: Tensor) -> Tensor:
        """Share of the noisy sample in the clean estimate."""
        if self.flow:
            return 1 - s / (s + 1)
        return self.sigma_data**2 / (s * s + self.sigma_data**2)

    def c_out(self, s: Tensor) -> Tensor:
        """Scale of the network's output in the clean estimate."""
        if self.flow:
            return -(s / (s + 1))
        return s * self.sigma_data * (s * s + self.sigma_data**2).rsqrt()

    def c_noise(self, s: Tensor) -> Tensor:
        """What the network is told instead of `s`."""
        return s / (s + 1) if self.flow else 0.25 * s.log()


@dataclass(frozen=True, slots=True)
class Convention:
    """The numerical language of a family.

    With noise level s in [0, 1] a sample is `x_s = alpha(s) x0 + s n`: `interpolant="linear"` has alpha = 1 - s
    (rectified flow, arXiv 2209.03003), `"cosine"` has alpha = sqrt(1 - s^2) (variance preserving), and `"additive"`,
    for s in [0, inf), has alpha = 1 (EDM).

    Attributes:
        prediction: what the network returns: "flow" is n - x0, "epsilon" is n, "x0" is x0, "v" is alpha n - s x0
            (arXiv 2202.00512), "edm" is what `preconditioning` says.
        sign: multiplies the network's output before it is read as `prediction` (LongCat-Video predicts the negative).
        interpolant: see above.
        timestep_scale: the network is called at timestep = s * timestep_scale.
        default_shift: the sigma shift the family is sampled and trained with unless a directory says otherwise.
        preconditioning: scalings around the network of an "edm" prediction, which is additive and unshifted; they set
            the timestep, so `timestep_scale` is not read.

    Raises:
        ConfigError: an "edm" prediction without preconditioning or with another interpolant, or the reverse.
    """

    prediction: Prediction = "flow"
    sign: int = 1
    interpolant: Literal["linear", "cosine", "additive"] = "linear"
    timestep_scale: float = 1000.0
    default_shift: float = 1.0
    preconditioning: Preconditioning | None = None

    def __post_init__(self) -> None:
        edm = self.preconditioning is not None
        if (self.prediction == "edm") is not edm or (self.interpolant == "additive") is not edm:
            raise ConfigError(
                f"prediction {self.prediction!r} with interpolant {self.interpolant!r} and preconditioning "
                f"{self.preconditioning}: 'edm', 'additive' and a preconditioning come together"
            )

    def timestep(self, s: Tensor) -> Tensor:
        """What the network is called with at noise level `s` (any shape)."""
        if self.preconditioning is not None:
            return self.preconditioning.c_noise(s)
        return s * self.timestep_scale

    def level(self, u: Tensor) -> Tensor:
        """The noise level at place `u` in [0, 1], from clean to noise (any shape): `u` itself.

        Where levels have no upper end, the one at which u parts of a sample are noise and 1 - u are not, u / (1 - u),
        within those that the network knows. A logit-normal `u` makes it log-normal, with the same mean and deviation
        (arXiv 2206.00364, section 5).
        """
        if self.preconditioning is None:
            return u
        low, high = self.preconditioning.levels
        return (u / (1 - u)).clamp(low, high)

    def alpha(self, s: Tensor) -> Tensor:
        """Scale of the clean sample at noise level `s` (any shape)."""
        if self.interpolant == "additive":
            return torch.ones_like(s)
        return 1.0 - s if self.interpolant == "linear" else (1.0 - s * s).clamp_min(0).sqrt()


def shift_sigma(s: Tensor, shift: float) -> Tensor:
    """Shifted noise level `shift s / (1 + (shift - 1) s)` (arXiv 2403.03206, section 5.3.2)."""
    return shift * s / (1 + (shift - 1) * s)
