"""The classes of docs/extending.md on a random Wan directory, each against a plain version."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from docs.blocks import ROOT, execute
from kinetoscope import VideoGenerator
from kinetoscope.attention import BACKENDS
from kinetoscope.attention.backends import math_attention
from kinetoscope.core.context import ForwardContext, forward_context
from kinetoscope.diffusion.noise import NoiseSource
from models import test_wan
from models.family_contract import FORWARD_TOLERANCE
from tiny import make_tiny_wan

PROMPT, NEGATIVE = "a red circle moving left on black", "a blue cat"
STEPS, SCALE = 5, 4.0
SHAPE = (16, 2, 4, 4)  # of the latents of 5 frames of 32 x 32
TOLERANCE = 1e-4  # of the latents' standard deviation
TEXT = (ROOT / "docs/extending.md").read_text()
SNIPPETS = dict(re.findall(r"^## (.+?)\n.*?^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL))


def snippet(title: str) -> dict[str, Any]:
    """The names that a block of the document defines."""
    return execute(SNIPPETS[title], {"__name__": "snippet"})


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_wan(tmp_path_factory.mktemp("wan"), scheduler="euler")


@pytest.fixture
def gen(path: Path) -> VideoGenerator:
    return VideoGenerator.from_pretrained(path, device="cpu", dtype="float32")


def latents_of(gen: VideoGenerator, guidance: float = SCALE, seed: Any = 3, **more: Any) -> Any:
    prompts = [PROMPT] * len(seed) if isinstance(seed, list) else PROMPT
    result: Any = gen.generate_video(
        prompts, NEGATIVE, 32, 32, 5, num_inference_steps=STEPS, guidance_scale=guidance, seed=seed, **more
    )
    return [r.latents for r in result] if isinstance(result, list) else result.latents


def oracle_latents(path: Path, guidance: float = SCALE) -> Tensor:
    """diffusers' WanPipeline on the same files."""
    from diffusers import WanPipeline

    oracle = WanPipeline.from_pretrained(path)
    oracle.set_progress_bar_config(disable=True)
    noise = torch.Generator("cpu").manual_seed(3)
    return oracle(
        prompt=PROMPT, negative_prompt=NEGATIVE, num_frames=5, height=32, width=32, num_inference_steps=STEPS,
        guidance_scale=guidance, generator=noise, output_type="latent",
    ).frames[0]  # fmt: skip


class Plain:
    """A run written out: one forward a branch, nothing prepared ahead."""

    def __init__(self, gen: VideoGenerator) -> None:
        self.transformer: Any = gen.pipeline.get_module("transformer")
        stage: Any = gen.pipeline.stages["text_encoding"]
        self.text = {
            name: stage.encode([text], torch.device("cpu"))[0]
            for name, text in (("cond", PROMPT), ("uncond", NEGATIVE))
        }
        schedule = gen.pipeline.get_module("scheduler").start(STEPS)
        self.times, self.sigmas = schedule.times, schedule.sigmas
        self.start = NoiseSource([3]).draw(SHAPE)

    @torch.no_grad()
    def predict(self, x: Tensor, index: int, branch: str) -> Tensor:
        return self.transformer(x, torch.tensor([self.times[index]]), self.text[branch])

    @torch.no_grad()
    def at(self, x: Tensor, t: float) -> Tensor:
        """The guided prediction at any timestep."""
        c, u = (self.transformer(x, torch.tensor([t]), self.text[branch]) for branch in ("cond", "uncond"))
        return u + SCALE * (c - u)

    def guided(self, x: Tensor, index: int) -> Tensor:
        uncond = self.predict(x, index, "uncond")
        return uncond + SCALE * (self.predict(x, index, "cond") - uncond)


def close(got: Tensor, expected: Tensor) -> bool:
    return bool((got - expected).abs().max() <= TOLERANCE * expected.std())


def test_every_snippet_has_forty_lines_at_most() -> None:
    assert len(SNIPPETS) == 6
    assert {title: n for title, text in SNIPPETS.items() if (n := len(text.splitlines())) > 40} == {}


# -- stage -------------------------------------------------------------------------------------------------------------


def test_stage(gen: VideoGenerator) -> None:
    plain = latents_of(gen)
    own, common = NoiseSource([3]).draw(SHAPE), NoiseSource([3]).fork(1).draw((16, 1, 4, 4))
    mixed = torch.stack([(own[:, :, t] + 0.5 * common[:, :, 0]) / 1.25**0.5 for t in range(2)], dim=2)
    given = latents_of(gen, latents=mixed[0])
    gen.pipeline.add_stage("mixed_noise", snippet("A stage")["MixedNoise"](0.5), after="latents")
    got = latents_of(gen)
    assert close(got, given) and not close(got, plain)
    batched = latents_of(gen, seed=[3, 4])
    assert close(batched[0], got) and close(batched[1], latents_of(gen, seed=4))


# -- strategy ----------------------------------------------------------------------------------------------------------


def renoising(gen: VideoGenerator, eta: float) -> Tensor:
    kind = snippet("A strategy")["RenoiseStrategy"]
    stage: Any = gen.pipeline.stages["denoising"]
    stage.strategy_cls = lambda parts: kind(parts, eta)
    return latents_of(gen)


def test_strategy_without_new_noise_is_the_reference_euler(gen: VideoGenerator, path: Path) -> None:
    assert close(renoising(gen, 0.0), oracle_latents(path))


def test_strategy_is_the_loop_written_out(gen: VideoGenerator) -> None:
    plain = Plain(gen)
    x = plain.start
    for i, (s, following) in enumerate(zip(plain.sigmas, plain.sigmas[1:], strict=False)):
        flow = plain.guided(x, i)
        clean = x - s * flow
        noise = (x - (1 - s) * clean) / s
        noise = 0.75**0.5 * noise + 0.5 * NoiseSource([3]).fork(i).draw(SHAPE)
        x = (1 - following) * clean + following * noise
    got = renoising(gen, 0.5)
    assert close(got, x[0]) and not close(got, renoising(gen, 0.4))


# -- guidance ----------------------------------------------------------------------------------------------------------


def test_guidance_by_hand() -> None:
    """c = (2, 0), u = (1, -3), so c - u = (1, 3); the scales are 3, 2 and 1."""
    guidance = snippet("A guidance")["FadingGuidance"](3.0)
    rows = {"cond": torch.tensor([[2.0, 0.0]]), "uncond": torch.tensor([[1.0, -3.0]])}
    assert [guidance.combine(rows, i, 3).tolist() for i in range(3)] == [[[4.0, 6.0]], [[3.0, 3.0]], [[2.0, 0.0]]]
    assert [guidance.needed(i, 3, None) for i in range(3)] == [("uncond", "cond")] * 2 + [("cond",)]


def test_guidance_is_the_loop_written_out(gen: VideoGenerator) -> None:
    plain = Plain(gen)
    x = plain.start
    for i, (s, following) in enumerate(zip(plain.sigmas, plain.sigmas[1:], strict=False)):
        c, u = plain.predict(x, i, "cond"), plain.predict(x, i, "uncond")
        weight = SCALE + (1 - SCALE) * i / (STEPS - 1)
        x = x + (following - s) * (u + weight * (c - u))
    ordinary = latents_of(gen)
    stage: Any = gen.pipeline.stages["denoising"]
    stage.strategy_cls = snippet("A guidance")["FadingStrategy"]
    got = latents_of(gen, trace=False)
    assert close(got, x[0]) and not close(got, ordinary)


# -- hook --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", ["sequential", "batched"])
def test_hook_is_the_loop_written_out(path: Path, cfg: str) -> None:
    cache = snippet("A hook")["StepCache"](every=3)
    gen = VideoGenerator.from_pretrained(path, device="cpu", dtype="float32", cfg=cfg)
    plain = Plain(gen)
    x, flow = plain.start, torch.empty(0)
    for i, (s, following) in enumerate(zip(plain.sigmas, plain.sigmas[1:], strict=False)):
        if i in (0, 3, 4):
            flow = plain.guided(x, i)
        x = x + (following - s) * flow
    got = latents_of(gen, hooks=[cache])
    assert close(got, x[0]) and not close(got, latents_of(gen))
    assert torch.equal(latents_of(gen, hooks=[snippet("A hook")["StepCache"](every=1)]), latents_of(gen))


def test_hook_keeps_open_runs_apart(gen: VideoGenerator) -> None:
    cache = snippet("A hook")["StepCache"](every=2)
    alone = [latents_of(gen, seed=seed, hooks=[cache]) for seed in (3, 4)]
    fields: Any = {
        "height": 32, "width": 32, "num_frames": 5, "num_inference_steps": STEPS, "guidance_scale": SCALE,
        "negative_prompt": NEGATIVE, "hooks": [cache],
    }  # fmt: skip
    runs = [gen.iterate(PROMPT, seed=seed, **fields) for seed in (3, 4)]
    done: list[Any] = [None, None]
    while any(d is None for d in done):
        for i, events in enumerate(runs):
            try:
                if done[i] is None:
                    next(events)
            except StopIteration as stop:
                done[i] = stop.value[0].latents
    assert all(torch.equal(d, a) for d, a in zip(done, alone, strict=True))


# -- solver ------------------------------------------------------------------------------------------------------------


def test_solver_passes_its_conformance_checks_and_is_the_loop_written_out(path: Path) -> None:
    names = snippet("A solver")
    checks = names["TestMidpoint"]()
    for name in [n for n in dir(checks) if n.startswith("test_")]:
        getattr(checks, name)()
    gen = VideoGenerator.from_pretrained(path, device="cpu", dtype="float32", scheduler="midpoint")
    plain = Plain(gen)
    x = plain.start
    for s, following in itertools.pairwise(plain.sigmas):
        middle = x + (following - s) / 2 * plain.at(x, 1000 * s)
        x = x + (following - s) * plain.at(middle, 1000 * (s + following) / 2)
    assert close(latents_of(gen), x[0])


# -- attention backend -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [1, 16, 45])
@pytest.mark.parametrize("bias", ["none", "random", "masked"])
def test_backend_is_the_formula(keys: int, bias: str) -> None:
    backend = snippet("An attention backend")["streaming_attention"]
    generator = torch.Generator().manual_seed(keys)
    q = 3 * torch.randn(2, 7, 3, 8, generator=generator)
    k, v = (torch.randn(2, keys, 3, 8, generator=generator) for _ in "kv")
    key_bias = None if bias == "none" else 2 * torch.randn(2, keys, generator=generator)
    if bias == "masked" and key_bias is not None:
        key_bias[:, : keys // 2] = -torch.inf  # the first blocks are masked whole
    got = backend(q, k, v, key_bias=key_bias)
    torch.testing.assert_close(got, math_attention(q, k, v, key_bias=key_bias), rtol=0, atol=1e-5)


class TestBackendInTheFamilyContract(test_wan.TestWanFolded):
    """Everything a Wan transformer must hold, with the document's backend in every layer."""

    @pytest.fixture(autouse=True)
    def backend(self) -> Iterator[None]:
        function = snippet("An attention backend")["streaming_attention"]
        with forward_context(ForwardContext({"self": function, "cross": function})):
            yield

    def test_a_wrong_backend_would_be_seen(self, pair: Any) -> None:
        """The contract can fail: one that reads the last block of keys alone is far outside its tolerance."""
        _, ours = pair
        inputs = self.inputs(self.SHAPES[0], torch.Generator().manual_seed(2))

        def last_block(q: Tensor, k: Tensor, v: Tensor, *, key_bias: Tensor | None = None) -> Tensor:
            return math_attention(q, k[:, -16:], v[:, -16:], key_bias=None if key_bias is None else key_bias[:, -16:])

        with torch.no_grad():
            right = ours(**inputs)
            with forward_context(ForwardContext({"self": last_block, "cross": last_block})):
                assert (ours(**inputs) - right).abs().max() > 100 * FORWARD_TOLERANCE


def test_backend_through_the_generator(path: Path) -> None:
    snippet("An attention backend")
    assert "streaming" in BACKENDS
    made = [
        latents_of(VideoGenerator.from_pretrained(path, device="cpu", dtype="float32", attention=name))
        for name in ("streaming", "math")
    ]
    assert close(*made) and not torch.equal(*made)
