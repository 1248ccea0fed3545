"""An object that lacks what its protocol asks for is refused where it is handed in, by class and method."""

from __future__ import annotations

import importlib
import pkgutil
from functools import partial
from typing import Any

import pytest
import torch

import kinetoscope
from engine.fakes import FakeBlockStrategy, FakeStrategy, make_batch
from kinetoscope import VideoGenerator
from kinetoscope.attention import BACKENDS, register_backend
from kinetoscope.core.errors import CompositionError, ConfigError
from kinetoscope.core.protocols import check_class
from kinetoscope.core.types import ExecutionArgs
from kinetoscope.engine.engine import DenoisingEngine
from kinetoscope.engine.hooks import Hook, Interceptor
from kinetoscope.engine.protocols import wanted_protocol
from kinetoscope.engine.strategies.standard import StandardStrategy
from kinetoscope.pipelines.stages.base import Stage
from tiny import make_tiny_wan

# Extensions that are wrong on purpose.
# pyright: reportIncompatibleMethodOverride=false


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> VideoGenerator:
    return VideoGenerator.from_pretrained(make_tiny_wan(tmp_path_factory.mktemp("wan")), device="cpu")


# -- stages ------------------------------------------------------------------------------------------------------------


class Complete:
    """A stage that does not derive from `Stage`."""

    optional = True

    def forward(self, batch: Any, args: Any) -> Any:
        return batch

    def iterate(self, batch: Any, args: Any) -> Any:
        yield from ()
        return batch


class ForwardOnly:
    optional = True

    def forward(self, batch: Any, args: Any) -> Any: ...


class ForwardOfBatch(Stage):
    def forward(self, batch: Any) -> Any: ...


class Nothing(Stage):
    pass


STAGES: list[tuple[Any, str]] = [
    (ForwardOnly(), r"stage 'mine': ForwardOnly has no method iterate\(batch, args\), which Stage asks for"),
    (ForwardOfBatch(), r"ForwardOfBatch.forward\(batch\) cannot be called as Stage asks: forward\(batch, args\)"),
    (Nothing(), "Nothing overrides neither forward"),
    (Nothing, r"the class Nothing was given; give an object of it, Nothing\(...\)"),
]


@pytest.mark.parametrize(("stage", "message"), STAGES)
def test_stage_is_refused_when_added(generator: VideoGenerator, stage: Any, message: str) -> None:
    pipeline = generator.pipeline
    before = list(pipeline.stages)
    with pytest.raises(CompositionError, match=message):
        pipeline.add_stage("mine", stage, after="latents")
    with pytest.raises(CompositionError, match=message):
        pipeline.stages["mine"] = stage
    with pytest.raises(CompositionError, match=message):
        pipeline.stages = {**pipeline.stages, "mine": stage}
    assert list(pipeline.stages) == before


def test_stage_of_another_class_is_accepted_when_it_has_the_methods(generator: VideoGenerator) -> None:
    generator.pipeline.add_stage("mine", Complete(), after="latents")  # pyright: ignore[reportArgumentType]
    assert generator.pipeline.remove_stage("mine")


# -- strategies --------------------------------------------------------------------------------------------------------


class NoPostprocess(FakeStrategy):
    postprocess: Any = None


class HalfBlocks(FakeStrategy):
    def block_plan(self, state: Any) -> Any: ...


class OtherForward(StandardStrategy):
    def forward(self, state: Any) -> Any: ...


FACTORIES: list[tuple[Any, str]] = [
    (NoPostprocess, r"NoPostprocess.postprocess is None; DenoisingStrategy asks for a method postprocess\(state\)"),
    (partial(NoPostprocess, []), "NoPostprocess.postprocess is None"),
    (HalfBlocks, r"HalfBlocks has no method init_block_context\(state, item, idx\)"),
    (OtherForward, r"OtherForward.forward\(state\) cannot be called as .*: forward\(state, model_inputs\)"),
    (lambda: None, "called with one positional argument"),
    ("standard", "'standard' is not callable"),
]


@pytest.mark.parametrize(("made", "message"), FACTORIES)
def test_strategy_class_is_refused_when_set(generator: VideoGenerator, made: Any, message: str) -> None:
    stage: Any = generator.pipeline.stages["denoising"]
    before = stage.strategy_cls
    with pytest.raises(CompositionError, match=message):
        stage.strategy_cls = made
    assert stage.strategy_cls is before


def test_strategy_is_refused_when_an_engine_is_made() -> None:
    with pytest.raises(CompositionError, match=r"strategy: HalfBlocks has no method init_block_context\(state, item"):
        DenoisingEngine(HalfBlocks([]))
    with pytest.raises(CompositionError, match="the class FakeStrategy was given"):
        DenoisingEngine(FakeStrategy)  # pyright: ignore[reportArgumentType]
    assert DenoisingEngine(FakeBlockStrategy([]))


# -- hooks -------------------------------------------------------------------------------------------------------------


class NoArguments(Hook):
    name = "none"

    def on_step_end(self) -> None: ...


class Misspelt(Hook):
    name = "misspelt"

    def on_step_ended(self, state: Any, step: Any) -> None: ...


class Watching(Hook):
    name = "watching"

    def around_forward(self, call: Any, state: Any, inputs: Any) -> Any: ...


class Swapped(Interceptor):
    name = "swapped"

    def around_forward(self, call: Any) -> Any: ...


class Bare:
    name = "bare"

    def on_step_end(self, state: Any, step: Any) -> None: ...


HOOKS: list[tuple[Any, str]] = [
    (
        NoArguments(),
        r"hook 'none': NoArguments.on_step_end\(\) cannot be called as .* on_step_end\(state, step\)",
    ),
    (Misspelt(), "Misspelt.on_step_ended is never called; did you mean on_step_end"),
    (Watching(), "Watching has no method bind"),
    (Swapped(), r"Swapped.around_forward\(call\) cannot be called as Interceptor asks"),
    (Bare(), "Bare has no attribute order"),
    (NoArguments, "the class NoArguments was given"),
]


@pytest.mark.parametrize(("hook", "message"), HOOKS)
def test_hook_is_refused_when_given(generator: VideoGenerator, hook: Any, message: str) -> None:
    with pytest.raises(CompositionError, match=message):
        generator.generate_video("a", height=32, width=32, num_frames=5, num_inference_steps=1, hooks=[hook])
    with pytest.raises(CompositionError, match=message):
        generator.pipeline.hooks = (hook,)
    with pytest.raises(CompositionError, match=message):
        VideoGenerator.from_pretrained(generator.pipeline.model, device="cpu", hooks=[hook])
    assert generator.pipeline.hooks == ()


def test_hooks_of_the_pipeline_can_be_changed(generator: VideoGenerator) -> None:
    class Counting(Hook):
        name = "counting"
        steps = 0

        def on_step_end(self, state: Any, step: Any) -> None:
            self.steps += 1

    hook = Counting()
    generator.pipeline.hooks = (hook,)
    size: Any = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2}
    generator.generate_video("a", **size)
    generator.pipeline.hooks = ()
    generator.generate_video("a", **size)
    assert hook.steps == 2


# -- guidance and attention --------------------------------------------------------------------------------------------


def test_guidance_is_refused_when_the_run_starts() -> None:
    class Half:
        scale, branches = 1.0, ("cond",)

        def needed(self, index: int) -> tuple[str, ...]:
            return ("cond",)

        def combine(self, predictions: Any, index: int = 0, count: int = 1, memory: Any = None) -> torch.Tensor:
            return predictions["cond"]

    engine = DenoisingEngine(FakeStrategy([]))
    state = engine.strategy.prepare(make_batch(), ExecutionArgs())
    state.guidance = Half()  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(CompositionError, match=r"guidance of FakeStrategy: Half.needed\(index\) cannot be called"):
        list(engine.iterate(state))


def test_attention_backend_is_refused_when_registered() -> None:
    bad: list[tuple[Any, Any, str]] = [
        (lambda q, k, v: q, None, r"'bad': <lambda>\(q, k, v\) cannot be called with .*\(q, k, v, key_bias=...\)"),
        (lambda q, k, v, *, key_bias=None: q, lambda device: None, "refuse: .* cannot be called with"),
        (3, None, "3 is not callable"),
    ]
    for backend, refuse, message in bad:
        with pytest.raises(ConfigError, match=message):
            register_backend("bad", backend, refuse)
    assert "bad" not in BACKENDS


# -- the package itself ------------------------------------------------------------------------------------------------


def test_every_hook_stage_and_strategy_of_the_package_has_what_is_asked() -> None:
    found = 0
    for package in ("engine", "models", "pipelines", "train"):
        root = importlib.import_module(f"kinetoscope.{package}")
        for info in pkgutil.walk_packages(root.__path__, f"{root.__name__}."):
            module = importlib.import_module(info.name)
            for kind in [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == info.name]:
                protocol = wanted_of(kind)
                if protocol is not None:
                    check_class(kind, protocol, kind.__name__)
                    found += 1
    assert found > 50 and kinetoscope


def wanted_of(kind: type) -> type | None:
    """The protocol that a class of the package should have; None: none."""
    if issubclass(kind, Hook):
        return Interceptor if issubclass(kind, Interceptor) else Hook
    if issubclass(kind, Stage):
        return Stage
    if hasattr(kind, "make_model_inputs") and hasattr(kind, "scheduler_step") and not getattr(kind, "_is_protocol", 0):
        return wanted_protocol(kind)
    return None
