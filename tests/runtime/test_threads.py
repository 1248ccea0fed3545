"""Generators in several threads: every video is bit for bit the one that its request makes alone."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from kinetoscope import VideoGenerator
from kinetoscope.core.context import ForwardContext, current_context, forward_context
from kinetoscope.core.serial import serialize_calls
from kinetoscope.diffusion.noise import SeededDraws, generator_for, randn
from kinetoscope.loading.offload import Offload
from kinetoscope.nn import compile as compile_module
from kinetoscope.pipelines.lazy import Lazy
from kinetoscope.pipelines.stages.prompt_cache import PromptCache
from kinetoscope.runtime import care
from runtime.movers import Elsewhere
from threads import in_threads
from tiny import make_tiny_wan, tiny_tokenizer

SIZE: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 4}
PROMPTS = ("a red cat", "a small blue circle moving left on black", "a", "a white square")


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_wan(tmp_path_factory.mktemp("wan"))


def videos(generator: VideoGenerator, first: int, count: int) -> list[Any]:
    """Results of `count` requests, whose prompts and seeds differ by `first`."""
    return [generator.generate_video(PROMPTS[(first + i) % len(PROMPTS)], seed=first + i, **SIZE) for i in range(count)]


def assert_equal(got: list[Any], expected: list[Any]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one.latents, other.latents) and (one.frames == other.frames).all()


def test_forward_context_is_that_of_its_thread() -> None:
    both = threading.Barrier(2)

    def watch(layer: int) -> list[int]:
        seen: list[int] = []
        with forward_context(ForwardContext(layer=layer)) as own:
            both.wait(60)  # both contexts are open
            context = current_context()
            both.wait(60)
            assert context is own
            seen.append(context.layer)
        both.wait(60)
        assert current_context() is None
        return seen

    assert in_threads([partial(watch, layer) for layer in range(2)]) == [[0], [1]]


def test_forward_context_is_traced_with_one_graph_for_all_threads() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")

    @torch.compile(fullgraph=True, backend=counter)
    def plus(x: torch.Tensor) -> torch.Tensor:
        context = current_context()
        return x - 1 if context is None else x + 1

    def call() -> float:
        with forward_context(ForwardContext()):
            return plus(torch.ones(3)).sum().item()

    assert call() == 6.0
    assert in_threads([call] * 4) == [6.0] * 4
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("cache", [None, "fbcache:threshold=0.5", "taylorseer:interval=2,warmup=1"])
@pytest.mark.parametrize("shared", [False, True], ids=["own weights", "shared modules"])
def test_two_generators_in_two_threads_give_their_own_videos(wan: Path, cache: str | None, shared: bool) -> None:
    first = VideoGenerator.from_pretrained(wan, "cpu", cache=cache)
    modules = {n: first.pipeline.get_module(n) for n in first.pipeline.model.components()} if shared else None
    second = VideoGenerator.from_pretrained(wan, "cpu", modules=modules)
    expected = [videos(first, 0, 3), videos(second, 10, 3)]
    got = in_threads([partial(videos, first, 0, 3), partial(videos, second, 10, 3)])
    for mine, theirs in zip(got, expected, strict=True):
        assert_equal(mine, theirs)


@pytest.mark.parametrize("options", [{}, {"cache": "fbcache:threshold=0.5"}, {"vae": "tiled"}, {"vae": "streaming"}])
def test_one_generator_in_two_threads_gives_each_its_videos(wan: Path, options: dict[str, Any]) -> None:
    generator = VideoGenerator.from_pretrained(wan, "cpu", **options)
    expected = [videos(generator, 0, 3), videos(generator, 10, 3)]
    fresh = VideoGenerator.from_pretrained(wan, "cpu", **options)  # its components load in both threads at once
    got = in_threads([partial(videos, fresh, 0, 3), partial(videos, fresh, 10, 3)])
    for mine, theirs in zip(got, expected, strict=True):
        assert_equal(mine, theirs)
    assert fresh._loras.held == 0


@pytest.mark.parametrize("kind", ["components", "blocks"])
def test_offloaded_generator_in_two_threads_gives_each_its_videos(
    wan: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = VideoGenerator.from_pretrained(wan, "cpu")
    expected = [videos(plain, 0, 2), videos(plain, 10, 2)]
    monkeypatch.setattr(care, "Offload", lambda name, device, _: Offload(name, device, Elsewhere()))
    generator = VideoGenerator.from_pretrained(wan, "cpu", offload=kind)
    got = in_threads([partial(videos, generator, 0, 2), partial(videos, generator, 10, 2)])
    for mine, theirs in zip(got, expected, strict=True):
        assert_equal(mine, theirs)


def test_compiled_generator_in_two_threads_gives_each_its_videos(wan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads compile while a third, whose generator is not compiled, computes."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    original = compile_module.compile_blocks
    monkeypatch.setattr(care, "compile_blocks", lambda part, mode: original(part, mode, counter))
    monkeypatch.setattr(compile_module, "missing_compiler", lambda device: None)
    plain = VideoGenerator.from_pretrained(wan, "cpu")
    expected = [videos(plain, first, 2) for first in (0, 10, 20)]
    compiled = VideoGenerator.from_pretrained(wan, "cpu", compile=True)
    work = [partial(videos, compiled, 0, 2), partial(videos, compiled, 10, 2), partial(videos, plain, 20, 2)]
    graphs = []
    for _ in range(2):
        for mine, theirs in zip(in_threads(work), expected, strict=True):
            assert_equal(mine, theirs)
        graphs.append(counter.frame_count)
    assert graphs[0] <= 2, "two threads that meet a block at the same time may each compile it"
    assert graphs[1] == graphs[0], "later each thread uses the graphs that are there"
    torch._dynamo.reset()


def test_plain_kernels_stay_while_another_thread_compiles() -> None:
    """torch's flag that something is being compiled is one for the whole process."""
    from kinetoscope.core import onednn

    layer = torch.nn.Conv3d(4, 4, 3, padding=1)
    onednn.speed_up_convolutions(layer)
    x = torch.randn((1, 4, 5, 8, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = layer(x)
        with torch.compiler._compile_session_context():
            assert torch.equal(layer(x), expected)
            assert not torch.compiler.is_dynamo_compiling()


def test_lazy_value_is_made_once_for_all_threads() -> None:
    made: list[int] = []

    def make() -> object:
        made.append(1)
        for _ in range(2000):
            pass
        return object()

    value = Lazy(make)
    found = in_threads([value.get] * 8)
    assert len(made) == 1 and len({id(f) for f in found}) == 1


def test_prompt_cache_drops_the_prompt_that_was_used_the_longest_time_ago() -> None:
    cache = PromptCache[str](2)
    encoded: list[str] = []

    def get(prompt: str) -> str:
        def encode() -> str:
            encoded.append(prompt)
            return prompt.upper()

        return cache.get(prompt, encode)

    for prompt in ("a", "b", "a", "c", "a", "b"):
        assert get(prompt) == prompt.upper()
    assert encoded == ["a", "b", "c", "b"]


def test_tokenizer_with_and_without_padding_serves_two_threads() -> None:
    tokenizer = serialize_calls(tiny_tokenizer())
    assert serialize_calls(tokenizer) is tokenizer and type(tokenizer).__name__ == "T5Tokenizer"
    plain = tokenizer("a red cat").input_ids

    def call(padded: bool) -> list[list[int]]:
        fields: dict[str, Any] = {"padding": "max_length", "max_length": 16, "truncation": True} if padded else {}
        return [list(tokenizer("a red cat", **fields).input_ids) for _ in range(150)]

    padded, bare = in_threads([partial(call, True), partial(call, False)])
    assert all(ids == plain for ids in bare)
    assert all(len(ids) == 16 and ids[: len(plain)] == plain for ids in padded)


def test_seeded_draws_leave_the_global_generator_and_other_threads_alone() -> None:
    draw_of_another_package = partial(torch.randn, (50,))
    expected = [randn((50,), generator_for(seed)) for seed in (1, 2)]
    before = torch.random.get_rng_state()

    def draw(seed: int) -> list[torch.Tensor]:
        draws = []
        for _ in range(50):
            with SeededDraws(seed):
                draws.append(draw_of_another_package())
        return draws

    drawn = in_threads([partial(draw, seed) for seed in (1, 2)])
    for mine, value in zip(drawn, expected, strict=True):
        assert all(torch.equal(d, value) for d in mine)
    assert torch.equal(torch.random.get_rng_state(), before)
