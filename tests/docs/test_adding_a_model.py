"""docs/adding-a-model.md followed word for word: the family it adds runs, and its proof can fail."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lint.references import matches, references
from torch import Tensor

from docs.blocks import ROOT, blocks, run
from kinetoscope import VideoGenerator
from kinetoscope.attention import attention
from kinetoscope.core.errors import CompositionError
from kinetoscope.engine.hooks.sequence import SequenceParallel
from kinetoscope.runtime.plan import plan_run
from kinetoscope.runtime.replay import replay
from tiny import perturb

DOCUMENT = ROOT / "docs/adding-a-model.md"
MODULES = ("toy", "tiny_toy", "plain_toy", "test_toy")


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The folder and the names after every block ran, the document's own tests among them."""
    folder = tmp_path_factory.mktemp("toy")
    with pytest.MonkeyPatch.context() as patch:
        yield folder, run(blocks(DOCUMENT, ""), folder, patch)
    for name in [n for n in sys.modules if n.partition(".")[0] in MODULES]:
        del sys.modules[name]


def test_a_video(followed: tuple[Path, dict[str, Any]]) -> None:
    folder, names = followed
    assert names["result"].frames.shape == (5, 32, 32, 3)
    assert replay(folder / "toy.mp4").identical
    gen = names["gen"]
    prompts = ["a red circle", "a blue square"]
    size: Any = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 4}
    together = gen.generate_video(prompts, seed=[1, 2], **size)
    for prompt, seed, got in zip(prompts, [1, 2], together, strict=True):
        alone = gen.generate_video(prompt, seed=seed, **size).latents
        assert (got.latents - alone).abs().max() <= 1e-4 * alone.std()
    assert plan_run(gen, gen.defaults()).pflop > 0
    other = VideoGenerator.from_pretrained(
        folder / "toy-tiny", device="cpu", dtype="float32", attention="math", cfg="sequential"
    )
    got = other.generate_video(prompts[0], seed=1, trace=True, **size)
    assert (got.latents - together[0].latents).abs().max() <= 1e-4 * got.latents.std()
    assert [step["rows"] for step in got.logging_info["step_trace"]] == [[["uncond"], ["cond"]]] * 4


def test_what_the_family_does_not_have_is_refused_by_name(followed: tuple[Path, dict[str, Any]]) -> None:
    folder, names = followed
    size: Any = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 2}
    cached = VideoGenerator.from_pretrained(folder / "toy-tiny", device="cpu", cache="fbcache")
    with pytest.raises(CompositionError, match="a step cache and ToyTransformer3DModel cannot be used together"):
        cached.generate_video("a", **size)
    for layout in ("tp=2", "fsdp=true,ulysses=2"):
        with pytest.raises(CompositionError, match=r"parallel (tp=2|fsdp=true) and ToyTransformer3DModel"):
            VideoGenerator.from_pretrained(folder / "toy-tiny", device="cpu", parallel=layout)
    shard: Any = object()
    shared = VideoGenerator.from_pretrained(folder / "toy-tiny", device="cpu", hooks=[SequenceParallel(shard)])
    with pytest.raises(CompositionError, match=r"sequence parallel \(ulysses, ring\) and ToyTransformer3DModel"):
        shared.generate_video("a", **size)
    assert names["gen"]


def test_the_transformer_imports_what_the_page_says(followed: tuple[Path, dict[str, Any]]) -> None:
    allowed = ["__future__.**", "collections.**", "typing.**", "torch.**", "toy.config.**"]
    allowed += [f"kinetoscope.{part}.**" for part in ("attention", "core", "nn")]
    found = references((followed[0] / "toy/transformer.py").read_text())
    assert found and all(any(matches(r.name, pattern) for pattern in allowed) for r in found if not r.spelled)


def unmasked(q: Tensor, k: Tensor, v: Tensor, *, role: str, key_bias: Tensor | None) -> Tensor:
    return attention(q, k, v, role=role)


BREAKAGES: dict[str, tuple[str, Any]] = {
    "rotation": ("apply_rope", lambda x, table: x),
    "frequencies": ("split_rope_dims", lambda dim: (dim // 3, dim // 3 - 2, dim // 3 + 2)),
    "mask": ("attention", unmasked),
    "scale": ("ModulatedNorm.forward", lambda self, x, shift, scale: x + shift),
}


@pytest.mark.parametrize("breakage", ["nothing", *BREAKAGES])
@pytest.mark.usefixtures("followed")
def test_the_proof_can_fail(breakage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = importlib.import_module("test_toy").TestToy()
    oracle = family.make_oracle()
    perturb(oracle, seed=1, scale=0.1)
    ours = family.make_ours(oracle)
    ours.load_state_dict(oracle.state_dict())
    if breakage == "nothing":
        family.test_forward((oracle, ours))
        return
    name, instead = BREAKAGES[breakage]
    monkeypatch.setattr(f"toy.transformer.{name}", instead)
    with pytest.raises(AssertionError):
        family.test_forward((oracle, ours))
