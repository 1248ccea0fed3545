"""What every family's transformer must hold against its oracle. A family subclasses `FamilyContract`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiny import perturb

FORWARD_TOLERANCE = 1e-5  # max abs, float32, one thread
BF16_SLACK = 1.5  # our bfloat16 drift against the oracle's own


class FamilyContract:
    """Checks shared by all families. A subclass gives `SHAPES` and the four methods."""

    SHAPES: tuple[tuple[int, ...], ...]  # latent shapes [R, C, T, H, W] to try

    def make_oracle(self) -> nn.Module:
        """A tiny random reference, float32."""
        raise NotImplementedError

    def make_ours(self, oracle: nn.Module) -> nn.Module:
        """Our module of the oracle's configuration, without its weights."""
        raise NotImplementedError

    def inputs(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
        """Keyword arguments of our forward for latents of `shape`."""
        raise NotImplementedError

    def call_oracle(self, oracle: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The oracle's output for the same inputs."""
        raise NotImplementedError

    def unused(self, name: str) -> bool:
        """Whether the outputs for `inputs` do not depend on a parameter."""
        return False

    # -- what subclasses inherit ---------------------------------------------------------------------------------------

    @pytest.fixture(scope="class")
    @classmethod
    def pair(cls) -> tuple[nn.Module, nn.Module]:
        """Oracle and ours with equal weights, every parameter perturbed so that no gate or norm hides a wrong term."""
        family = cls()
        oracle = family.make_oracle().eval()
        perturb(oracle, seed=1, scale=0.1)
        ours = family.make_ours(oracle)
        ours.load_state_dict(oracle.state_dict())
        return oracle, ours

    def test_names_and_shapes(self, pair: tuple[nn.Module, nn.Module]) -> None:
        oracle, ours = pair
        assert _shapes(ours) == _shapes(oracle)

    def test_forward(self, pair: tuple[nn.Module, nn.Module]) -> None:
        oracle, ours = pair
        generator = torch.Generator().manual_seed(2)
        for shape in self.SHAPES:
            inputs = self.inputs(shape, generator)
            with torch.no_grad():
                expected = self.call_oracle(oracle, inputs)
                torch.testing.assert_close(ours(**inputs), expected, rtol=0, atol=FORWARD_TOLERANCE)
            assert expected.std() > 0.1, "the comparison needs outputs of some size"

    def test_rows_are_independent(self, pair: tuple[nn.Module, nn.Module]) -> None:
        _, ours = pair
        inputs = self.inputs((3, *self.SHAPES[0][1:]), torch.Generator().manual_seed(3))
        with torch.no_grad():
            batched = ours(**inputs)
            alone = [
                ours(**{k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in inputs.items()}) for i in range(3)
            ]
        torch.testing.assert_close(batched, torch.cat(alone), rtol=0, atol=FORWARD_TOLERANCE)

    def test_gradients(self, pair: tuple[nn.Module, nn.Module]) -> None:
        oracle, ours = pair
        inputs = self.inputs((2, *self.SHAPES[0][1:]), torch.Generator().manual_seed(4))
        for module in pair:
            module.zero_grad()
        self.call_oracle(oracle, inputs).square().mean().backward()
        ours(**inputs).square().mean().backward()
        expected = dict(oracle.named_parameters())
        for name, parameter in ours.named_parameters():
            if self.unused(name):
                assert parameter.grad is None or not parameter.grad.any(), name
                continue
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-6, msg=name)

    def test_bfloat16_drift(self, pair: tuple[nn.Module, nn.Module], record_property: Any) -> None:
        oracle, ours = pair
        inputs = self.inputs(self.SHAPES[0], torch.Generator().manual_seed(5))
        keep = set(oracle._keep_in_fp32_modules or ())
        low_oracle = _to_bfloat16(oracle, keep)
        low_ours = _to_bfloat16(ours, set(ours.keep_in_float32))
        with torch.no_grad():
            exact = self.call_oracle(oracle, inputs)
            theirs = self.call_oracle(low_oracle, {k: _low(v) for k, v in inputs.items()}).float()
            got = low_ours(**inputs)
        drift = [((x - exact).norm() / exact.norm()).item() for x in (got, theirs)]
        record_property("bf16_drift_ours", drift[0])
        record_property("bf16_drift_oracle", drift[1])
        assert drift[0] <= BF16_SLACK * drift[1], drift


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.state_dict().items()}


def _to_bfloat16(module: nn.Module, keep: set[str]) -> nn.Module:
    """A copy in bfloat16, but for parameters below a module named in `keep` and for buffers."""
    low = copy.deepcopy(module)
    for name, parameter in low.named_parameters():
        if not keep & set(name.split(".")):
            parameter.data = parameter.data.bfloat16()
    return low


def _low(value: Any) -> Any:
    """Tensors of data in bfloat16; scalars a row (timesteps, lengths) as they are."""
    return value.bfloat16() if isinstance(value, Tensor) and value.ndim >= 3 else value
