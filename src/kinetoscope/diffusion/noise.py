"""Where every random number of a run comes from.

One CPU generator a sample, drawn at the global shape: the noise is the same whatever the batch size, the device or the
number of ranks. The first draw equals diffusers' `randn_tensor` with the same seed. Everything else in the package asks
here; a bare `torch.randn` is refused by lint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kinetoscope.core.transfer import to_device


def randn(shape: Sequence[int], generator: torch.Generator, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal draw of `shape` from an explicit CPU `generator`, on the CPU."""
    return torch.randn(tuple(shape), generator=generator, dtype=dtype)


def generator_for(seed: int) -> torch.Generator:
    """A CPU generator seeded with `seed`."""
    return torch.Generator("cpu").manual_seed(seed)


class NoiseSource:
    """Noise of one run: one generator for each sample.

    Args:
        seeds: one seed a sample. torch's CPU generator reads their low 32 bits, so requests may not have larger ones
            (`pipelines.stages.validation.MAX_SEED`); `fork` reads all of a seed.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = tuple(int(s) for s in seeds)
        self._generators = [generator_for(s) for s in self.seeds]

    def draw(self, shape: Sequence[int]) -> Tensor:
        """Next draw, [B, *shape] float32 on the CPU, where B is the number of seeds."""
        return torch.stack([randn(shape, g) for g in self._generators])

    def fork(self, *key: int) -> NoiseSource:
        """An independent source for a block, stream or branch named by integers; does not advance this one.

        The child seeds are a fixed function of (seed, key), so block 7 has the same noise however it is reached.
        """
        return NoiseSource([_mix(seed, key) for seed in self.seeds])


class SeededDraws(TorchFunctionMode):
    """Inside the `with`, `torch.randn` and `torch.randn_like` of this thread draw from a generator of their own.

    For modules of other packages that draw from torch's global generator. The numbers are those of the global generator
    of the CPU after `torch.manual_seed(seed)`, on every device; that generator and other threads are left alone.

    Args:
        seed: of the draws.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = generator_for(seed)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the function; a draw without a generator gets this one."""
        given: dict[str, Any] = dict(kwargs or {})
        if func is torch.randn_like:
            like: Tensor = args[0]
            given = {"dtype": like.dtype, "device": like.device, **given}
            func, args = torch.randn, (tuple(like.shape),)
        if func is not torch.randn or given.get("generator") is not None:
            return func(*args, **given)
        device = given.pop("device", None)
        drawn: Tensor = func(*args, **{**given, "generator": self._generator})
        return drawn if device is None else to_device(drawn, device)


def _mix(seed: int, key: tuple[int, ...]) -> int:
    """splitmix64 over the seed and the key words (Steele, Lea, Flood 2014), cut to 63 bits."""
    mask = (1 << 64) - 1
    z = seed & mask
    for word in (len(key), *key):
        z = (z + 0x9E3779B97F4A7C15 + (word & mask)) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        z ^= z >> 31
    return z >> 1
