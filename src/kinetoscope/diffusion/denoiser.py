"""A network and the language it speaks, as one object for training and for sampling."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from kinetoscope.diffusion.convention import Convention, Preconditioning


class Network(Protocol):
    """Anything that maps noisy latents [R, C, T, H, W] and timesteps [R] to an output of the latents' shape."""

    def __call__(self, latents: Tensor, timestep: Tensor, **conditioning: Any) -> Tensor: ...


class Denoiser:
    """Reads a network's output by its family's convention. All arithmetic outside the network is float32.

    Noise levels `s` (in [0, 1], or [0, inf) for EDM) are float tensors of shape [R] (one a sample), or any shape that
    broadcasts against the latents once trailing axes are added, for instance [R, T] for one level a latent frame (then
    axis 2 of the latents). A level without axes may stay on the host, and then no step copies it to the device.

    Args:
        network: the transformer.
        convention: what its output means.
    """

    def __init__(self, network: Network, convention: Convention) -> None:
        self.network = network
        self.convention = convention

    def predict(self, x: Tensor, s: Tensor, **conditioning: Any) -> Tensor:
        """Network output in the convention's own terms (sign applied), float32, shape of `x`."""
        if (edm := self.convention.preconditioning) is not None:
            x = x * edm.c_in(self._levels(s, x)[0])
        out = self.network(x, self.convention.timestep(s), **conditioning)
        return out.float() * self.convention.sign

    def predict_x0(self, x: Tensor, s: Tensor, **conditioning: Any) -> Tensor:
        """Estimate of the clean sample, float32, shape of `x`."""
        return self.to_x0(self.predict(x, s, **conditioning), x, s)

    def predict_noise(self, x: Tensor, s: Tensor, **conditioning: Any) -> Tensor:
        """Estimate of the noise, float32, shape of `x`."""
        return self.to_noise(self.predict(x, s, **conditioning), x, s)

    def to_x0(self, output: Tensor, x: Tensor, s: Tensor) -> Tensor:
        """Clean-sample estimate from a prediction made at `x`, `s`."""
        sigma, alpha = self._levels(s, x)
        x = x.float()
        match self.convention.prediction:
            case "x0":
                return output
            case "flow":  # n = (x - alpha x0) / s and output = n - x0
                return (x - sigma * output) / (alpha + sigma)
            case "epsilon":
                return (x - sigma * output) / alpha
            case "v":
                return (alpha * x - sigma * output) / (alpha * alpha + sigma * sigma)
            case "edm":
                edm = self._preconditioning
                return edm.c_skip(sigma) * x + edm.c_out(sigma) * output

    def to_noise(self, output: Tensor, x: Tensor, s: Tensor) -> Tensor:
        """Noise estimate from a prediction made at `x`, `s`."""
        sigma, alpha = self._levels(s, x)
        x = x.float()
        match self.convention.prediction:
            case "epsilon":
                return output
            case "flow":  # x0 = n - output
                return (x + alpha * output) / (alpha + sigma)
            case "x0":
                return (x - alpha * output) / sigma
            case "v":
                return (sigma * x + alpha * output) / (alpha * alpha + sigma * sigma)
            case "edm":
                return (x - self.to_x0(output, x, s)) / sigma

    def add_noise(self, x0: Tensor, noise: Tensor, s: Tensor) -> Tensor:
        """Noisy sample at level `s`, float32: alpha(s) x0 + s noise."""
        sigma, alpha = self._levels(s, x0)
        return alpha * x0.float() + sigma * noise.float()

    def target(self, x0: Tensor, noise: Tensor, s: Tensor) -> Tensor:
        """What `predict` should return at `add_noise(x0, noise, s)`, float32."""
        sigma, alpha = self._levels(s, x0)
        x0, noise = x0.float(), noise.float()
        match self.convention.prediction:
            case "x0":
                return x0
            case "flow":
                return noise - x0
            case "epsilon":
                return noise
            case "v":
                return alpha * noise - sigma * x0
            case "edm":
                edm = self._preconditioning
                return (x0 - edm.c_skip(sigma) * (x0 + sigma * noise)) / edm.c_out(sigma)

    def loss(
        self, x0: Tensor, noise: Tensor, s: Tensor, *, weight: Tensor | None = None, **conditioning: Any
    ) -> Tensor:
        """Mean squared error of the prediction, one value a sample: [R] float32, differentiable in the network.

        Args:
            x0, noise: [R, C, T, H, W].
            s: levels, [R] or [R, T].
            weight: of each squared error, broadcast against x0; None: 1.
            conditioning: of the network.
        """
        output = self.predict(self.add_noise(x0, noise, s), s, **conditioning)
        error = (output - self.target(x0, noise, s)).square()
        return (error if weight is None else weight * error).flatten(1).mean(1)

    @property
    def _preconditioning(self) -> Preconditioning:
        assert self.convention.preconditioning is not None  # the convention holds it together with "edm"
        return self.convention.preconditioning

    def _levels(self, s: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return sigma and alpha shaped to broadcast against x: [R] -> [R,1,1,1,1], [R,T] -> [R,1,T,1,1]."""
        if s.ndim == 0:
            return s.float(), self.convention.alpha(s.float())
        sigma = s.to(device=x.device, dtype=torch.float32)
        if sigma.ndim == 2:
            sigma = sigma.unsqueeze(1)
        sigma = sigma.reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))
        return sigma, self.convention.alpha(sigma)
