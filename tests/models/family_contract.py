"""What every family's transformer must hold. A family with a module to compare with subclasses `FamilyContract`; one
that is compared with recordings, in tests of its own, `TransformerContract`."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from kinetoscope.attention import capabilities, resolve_attention
from kinetoscope.core.context import ForwardContext, forward_context, with_stack
from kinetoscope.core.errors import CompositionError
from kinetoscope.core.sharding import ShardPlan
from kinetoscope.engine.protocols import take_rows
from kinetoscope.nn.stack import BlockCall, check_stack, run_calls
from tiny import perturb

FORWARD_TOLERANCE = 1e-5  # max abs, float32, one thread
BF16_SLACK = 1.5  # our bfloat16 drift against the oracle's own
BF16_DRIFT = 0.05  # our bfloat16 drift where the oracle is a recording
CAPABILITIES = frozenset({"blocks", "stack", "tokens", "plan"})
"""What a family may have: `blocks` (compile, quantize, offload=blocks); a forward that runs them through
`nn.stack.run_blocks` (step caches, activation checkpointing); calls that say which arguments go with tokens (ulysses,
ring); and a plan of how devices share its weights (tp, fsdp)."""
ONCE = {"PUBLISHED": "test_published_names_and_shapes", "COMPILED": "test_blocks_compile_without_a_break"}
"""Slow checks that one of a family's classes is enough for: the first, and each that names the attribute itself."""


class TransformerContract:
    """What a transformer must hold by itself.

    A subclass gives `SHAPES`, `ROLES` and two methods, and says which of the inputs `prepare_shared`,
    `prepare_timesteps` and every forward take; the others are `prepare_conditioning`'s.
    """

    SHAPES: ClassVar[tuple[tuple[int, ...], ...]]  # latent shapes [R, C, T, H, W] to try
    ROLES: ClassVar[Sequence[str]]  # of the attention layers of a forward, in order
    SHARED: ClassVar[tuple[str, ...]] = ()
    TIMED: ClassVar[tuple[str, ...]] = ()
    KEPT: ClassVar[tuple[str, ...]] = ()
    COMPILED: ClassVar[bool] = True
    CAPABILITIES: ClassVar[frozenset[str]] = CAPABILITIES  # what the family has; the others must be refused by name

    def __init_subclass__(cls) -> None:
        if cls.__module__ == __name__:
            return
        contract = next(c for c in cls.__mro__ if c.__module__ == __name__)
        for attribute, test in ONCE.items():
            if contract not in cls.__bases__ and attribute not in vars(cls):
                setattr(cls, test, None)  # pytest collects callables only
            elif hasattr(contract, test):
                setattr(cls, test, getattr(contract, test))

    def make_model(self) -> nn.Module:
        """A tiny transformer, float32, no parameter at zero or one."""
        raise NotImplementedError

    def inputs(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
        """Keyword arguments of our forward for latents of `shape`, three rows at the most."""
        raise NotImplementedError

    def at_step(self, inputs: dict[str, Any], timesteps: Tensor, index: int) -> dict[str, Any]:
        """The inputs of a forward at one of a run's timesteps."""
        return inputs | {"timestep": timesteps[index : index + 1]}

    def unused(self, name: str) -> bool:
        """Whether the outputs for `inputs` do not depend on a parameter."""
        return False

    # -- what subclasses inherit ---------------------------------------------------------------------------------------

    @pytest.fixture(scope="class")
    @classmethod
    def ours(cls) -> nn.Module:
        return cls().make_model()

    def prepare(self, ours: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a run computes ahead: row-first trees, and what is the same for all rows."""
        apart = {"latents", "timestep", *self.SHARED, *self.TIMED, *self.KEPT}
        rows: Any = ours.prepare_conditioning(**{k: v for k, v in inputs.items() if k not in apart})  # pyright: ignore
        shared = {k: inputs[k] for k in self.SHARED if k in inputs}
        rows |= {k: inputs[k] for k in self.KEPT if k in inputs}
        return rows, ours.prepare_shared(inputs["latents"].shape, **shared)  # pyright: ignore

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_prepared_is_bit_equal(self, ours: nn.Module, dtype: torch.dtype) -> None:
        """What a run computes ahead changes no bit of its steps."""
        model = _to_bfloat16(ours, set(ours.keep_in_float32)) if dtype == torch.bfloat16 else ours  # pyright: ignore
        generator = torch.Generator().manual_seed(6)
        shape = (1, *self.SHAPES[0][1:])
        inputs = self.inputs(shape, generator)
        timesteps = torch.cat([self.inputs(shape, generator)["timestep"] for _ in range(3)])
        timed = {k: inputs[k] for k in self.TIMED if k in inputs}
        with torch.no_grad():
            rows, shared = self.prepare(model, inputs)
            steps: Any = model.prepare_timesteps(timesteps, **timed)  # pyright: ignore
            for index in range(3):
                given = self.at_step(inputs, timesteps, index)
                ahead = take_rows(steps, slice(index, index + 1))
                got = model(given["latents"], given["timestep"], **rows, **shared, **ahead)
                assert torch.equal(got, model(**given))

    def test_any_rows_equal_all_rows(self, ours: nn.Module) -> None:
        """Rows are independent, prepared or not: what the engine leaves out changes nothing of what it keeps."""
        inputs = self.inputs((3, *self.SHAPES[0][1:]), torch.Generator().manual_seed(3))
        with torch.no_grad():
            whole = ours(**inputs)
            conditioning, shared = self.prepare(ours, inputs)
            for kept in (slice(0, 1), slice(1, 2), slice(2, 3), slice(0, 2), slice(1, 3)):
                some = take_rows(inputs, kept)
                torch.testing.assert_close(ours(**some), whole[kept], rtol=0, atol=FORWARD_TOLERANCE)
                ahead = take_rows(conditioning, kept)
                timed = {k: inputs[k] for k in self.TIMED if k in inputs}
                got = ours(some["latents"], some["timestep"], **ahead, **shared, **timed)
                torch.testing.assert_close(got, whole[kept], rtol=0, atol=FORWARD_TOLERANCE)

    def test_layers_ask_for_their_role(self, ours: nn.Module) -> None:
        asked: list[str] = []

        def backend(role: str) -> Any:
            def call(q: Tensor, k: Tensor, v: Tensor, *, key_bias: Tensor | None = None) -> Tensor:
                asked.append(role)
                return torch.zeros_like(q)

            return call

        inputs = self.inputs((1, *self.SHAPES[0][1:]), torch.Generator().manual_seed(7))
        with torch.no_grad(), forward_context(ForwardContext({role: backend(role) for role in set(self.ROLES)})):
            ours(**inputs)
        assert asked == list(self.ROLES)

    def test_capabilities_work_or_are_refused_by_name(self, ours: nn.Module) -> None:
        """What a user may ask for acts on this family, or is an error that names its class: never silently absent."""
        seen: list[BlockCall] = []

        def stack(x: Any, calls: Sequence[BlockCall]) -> Any:
            seen.extend(calls)
            return run_calls(x, calls)

        inputs = self.inputs((1, *self.SHAPES[0][1:]), torch.Generator().manual_seed(9))
        with torch.no_grad():
            plain = ours(**inputs)
            with with_stack(stack) as context:
                assert torch.equal(ours(**inputs), plain)
        name = type(ours).__name__
        found = {"blocks"} if list(getattr(ours, "blocks", ())) else set[str]()
        if seen:
            assert {c.block for c in seen} >= set(ours.blocks)  # pyright: ignore - every block is in the stack
            found.add("stack")
            check_stack(context, "a step cache", ours)
        else:
            with pytest.raises(CompositionError, match=f"a step cache and {name} cannot be used together"):
                check_stack(context, "a step cache", ours)
        if seen and all(c.tokens is not None or not (c.rows or c.shared) for c in seen):
            found.add("tokens")
        spec = importlib.import_module(f"{type(ours).__module__.rpartition('.')[0]}.spec")
        if any(isinstance(value, ShardPlan) for value in vars(spec).values()):
            found.add("plan")
        assert found == self.CAPABILITIES

    def test_blocks_compile_without_a_break(self, ours: nn.Module) -> None:
        """One graph a block, with attention read from the context; compiled inference equals eager inference."""
        inputs = self.inputs((1, *self.SHAPES[0][1:]), torch.Generator().manual_seed(8))
        torch.compiler.reset()  # graphs of other models' blocks, which would be tried first
        compiled = copy.deepcopy(ours)
        blocks: Any = compiled.blocks
        for block in blocks:
            block.compile(backend="aot_eager", fullgraph=True)
        table = resolve_attention("auto", capabilities("cpu", torch.float32), tuple(dict.fromkeys(self.ROLES)))
        with torch.no_grad(), forward_context(ForwardContext(table)):
            torch.testing.assert_close(compiled(**inputs), ours(**inputs), rtol=0, atol=FORWARD_TOLERANCE)

    def test_gradients(self, ours: nn.Module) -> None:
        """Every parameter has one."""
        model = copy.deepcopy(ours).requires_grad_(True)
        model(**self.inputs((2, *self.SHAPES[0][1:]), torch.Generator().manual_seed(4))).square().mean().backward()
        for name, parameter in model.named_parameters():
            moved = parameter.grad is not None and bool(parameter.grad.any())
            assert moved is not self.unused(name), name

    def test_bfloat16_drift(self, ours: nn.Module, record_property: Any) -> None:
        inputs = self.inputs(self.SHAPES[0], torch.Generator().manual_seed(5))
        low = _to_bfloat16(ours, set(ours.keep_in_float32))  # pyright: ignore
        with torch.no_grad():
            exact, got = ours(**inputs), low(**{k: _low(v) for k, v in inputs.items()}).float()
        drift = ((got - exact).norm() / exact.norm()).item()
        record_property("bf16_drift_ours", drift)
        assert drift < BF16_DRIFT


class FamilyContract(TransformerContract):
    """Checks against a module. A subclass gives `MODEL`, `CONFIG`, `ORACLE`, `TINY`, `PUBLISHED`, or overrides what
    reads them; and `call_oracle`."""

    MODEL: ClassVar[Any]  # our class, and its configuration's
    CONFIG: ClassVar[Any]
    ORACLE: ClassVar[Any]  # the reference's class
    TINY: ClassVar[Mapping[str, Any]]  # fields of a tiny configuration
    PUBLISHED: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # published model -> fields that are not the defaults

    def make_oracle(self) -> nn.Module:
        """A tiny random reference, float32."""
        return self.ORACLE(**self.TINY)

    def make_ours(self, oracle: Any) -> nn.Module:
        """Our module of the oracle's configuration, without its weights."""
        return self.MODEL(self.CONFIG.from_dict(oracle.config))

    def call_oracle(self, oracle: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The oracle's output for the same inputs."""
        raise NotImplementedError

    def published_shapes(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Names and shapes of a published model's parameters; called on the meta device."""
        return _shapes(self.ORACLE(**config))

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

    @pytest.fixture(scope="class")
    @classmethod
    def ours(cls, pair: tuple[nn.Module, nn.Module]) -> nn.Module:
        return pair[1]

    def make_model(self) -> nn.Module:
        """As in the checks against the oracle."""
        oracle = self.make_oracle()
        perturb(oracle, seed=1, scale=0.1)
        ours = self.make_ours(oracle)
        ours.load_state_dict(oracle.state_dict())
        return ours

    def test_names_and_shapes(self, pair: tuple[nn.Module, nn.Module]) -> None:
        oracle, ours = pair
        assert _shapes(ours) == _shapes(oracle)

    def test_published_names_and_shapes(self) -> None:
        """On the meta device, without a byte of weights, at full size."""
        assert self.PUBLISHED, "name the published configurations"
        for name, config in self.PUBLISHED.items():
            with torch.device("meta"):
                ours, expected = self.MODEL(self.CONFIG.from_dict(config)), self.published_shapes(config)
            assert _shapes(ours) == expected, name
            assert all(parameter.is_meta for parameter in ours.parameters()), name
            assert not list(ours.buffers()), name

    def test_forward(self, pair: tuple[nn.Module, nn.Module]) -> None:
        oracle, ours = pair
        generator = torch.Generator().manual_seed(2)
        for shape in self.SHAPES:
            inputs = self.inputs(shape, generator)
            with torch.no_grad():
                expected = self.call_oracle(oracle, inputs)
                torch.testing.assert_close(ours(**inputs), expected, rtol=0, atol=FORWARD_TOLERANCE)
            assert expected.std() > 0.1, "the comparison needs outputs of some size"

    def test_gradients(self, pair: tuple[nn.Module, nn.Module]) -> None:  # pyright: ignore
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

    def test_bfloat16_drift(self, pair: tuple[nn.Module, nn.Module], record_property: Any) -> None:  # pyright: ignore
        oracle, ours = pair
        inputs = self.inputs(self.SHAPES[0], torch.Generator().manual_seed(5))
        keep: Any = oracle._keep_in_fp32_modules or ()
        low_oracle = _to_bfloat16(oracle, set(keep))
        low_ours = _to_bfloat16(ours, set(ours.keep_in_float32))  # pyright: ignore
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
